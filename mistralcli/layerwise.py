"""A checkpoint run one layer at a time, so that a model of any size can be measured in the memory of one layer."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mistralcli.cache import KVCache
from mistralcli.checkpoint_files import hugging_face_name
from mistralcli.config import ModelConfig, read_config
from mistralcli.model import Linear, LinearFactory, RMSNorm, TransformerBlock, dense_linear
from mistralcli.ops import rotary_tables
from mistralcli.weights import expected_tensors, has_tensors, linear_factory, load_module, open_checkpoint
from quant.linear import QuantizedLinear

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"

_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_TILE_WEIGHTS = 1 << 25
"""Of a dense head that are in the type of the computation at once: 128 MiB of float32."""


class Layer(TransformerBlock):
    """Layer `index` of a model; its linears are called as in `Transformer`: attention.wq, feed_forward.w1 and so on."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, index: int) -> None:
        super().__init__(config, linear, f"layers.{index}")
        self.index = index

    def tensor_modules(self) -> dict[str, nn.Module]:
        """The modules that have tensors of their own, by their full names in a Hugging Face checkpoint."""
        modules = ((name, module) for name, module in self.named_modules() if has_tensors(module))
        return {hugging_face_name(f"layers.{self.index}.{name}"): module for name, module in modules}


class Head(nn.Module):
    """Final norm and head: the last layer's output (..., dim) to logits of the next token (..., vocab_size), float32.

    A dense head is multiplied in tiles of its rows: in float32 that of a large vocabulary outweighs a layer.
    """

    def __init__(self, config: ModelConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        make = dense_linear if config.tied_embeddings else linear
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = make("output", config.dim, config.vocab_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normalized: torch.Tensor = self.norm(hidden)
        if isinstance(self.output, QuantizedLinear):
            quantized: torch.Tensor = self.output(normalized)
            return quantized.float()
        assert isinstance(self.output, Linear)
        tiles = self.output.weight.split(max(1, _TILE_WEIGHTS // normalized.shape[-1]))
        return torch.cat([F.linear(normalized, tile.to(normalized.dtype)).float() for tile in tiles], dim=-1)


class LayerwiseModel:
    """A checkpoint of any kind that we load, run one layer at a time: at most one layer's weights are in memory.

    Quantized layers compute with their weights as stored, and on inputs that no kernel of the CPU rounds. Embedding and
    head stay in the files, as they are stored there, but for what a call takes of them.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the checkpoint in `directory`, to compute in `dtype` on `device`.

        Raises:
            ModelNotFoundError, IntegrityError, MistralError: as `open_checkpoint`.
        """
        self.directory = directory
        self.config = read_config(directory)
        self.dtype = dtype
        self.device = torch.device(device)
        self._checkpoint = open_checkpoint(directory)
        self._linear = linear_factory(self.config)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The first layer's input: (n_seqs, n_tokens) to (n_seqs, n_tokens, dim)."""
        table = self._checkpoint.load(f"{_EMBEDDING}.weight")
        hidden = F.embedding(token_ids.to(table.device), table)
        self._checkpoint.release()
        return hidden.to(self.device, self.dtype)

    def layer(self, index: int) -> Layer:
        """Layer `index` with its weights, for as long as the caller keeps it."""
        layer = self._empty_layer(index, self._linear)
        for name, module in layer.tensor_modules().items():
            self._load(name, module, self.dtype)
        return layer

    def layer_from(self, index: int, weights: Mapping[str, torch.Tensor]) -> Layer:
        """Layer `index` with these dense weights, by full name (`model.layers.0.mlp.up_proj.weight`)."""
        layer = self._empty_layer(index, dense_linear)
        for name, module in layer.tensor_modules().items():
            load_module(self._checkpoint, name, module, weights, self.device, self.dtype)
        return layer

    def run_layer(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output for whole sequences from position 0 on, causal and within its window.

        hidden: (n_seqs, n_tokens, dim); returns the same shape.
        """
        n_seqs, n_tokens, _ = hidden.shape
        window = self.config.sliding_windows[layer.index]
        cache = KVCache(
            replace(self.config, n_layers=1, sliding_windows=(window,)),
            max_seq_len=n_tokens,
            n_seqs=n_seqs,
            slack=n_tokens,
            dtype=self.dtype,
            device=self.device,
        )
        positions = torch.arange(n_tokens).repeat(n_seqs, 1)
        pieces = cache.begin(positions)
        cos, sin = rotary_tables(positions.to(self.device), self.config.head_dim, self.config.rope_theta)
        output: torch.Tensor = layer(hidden, cos, sin, cache.layers[0], pieces)
        return output

    def head(self) -> "Head":
        """The final norm and the head, which stays as it is stored, for as long as the caller keeps them."""
        with torch.device("meta"):
            head = Head(self.config, self._linear)
        self._load(_NORM, head.norm, self.dtype)
        self._load(_EMBEDDING if self.config.tied_embeddings else _HEAD, head.output, None)
        return head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, float32, of the last layer's output: (..., dim) to (..., vocab_size)."""
        logits: torch.Tensor = self.head()(hidden)
        return logits

    @property
    def largest_layer_bytes(self) -> int:
        """What the weights of a layer take at most once it is loaded."""
        layers: dict[str, int] = defaultdict(int)
        for name in self._checkpoint.names():
            if match := _LAYER.match(name):
                spec = self._checkpoint.spec(name)
                is_dense = spec.dtype.is_floating_point and name.endswith(".weight")
                layers[match[1]] += math.prod(spec.shape) * (self.dtype if is_dense else spec.dtype).itemsize
        return max(layers.values())

    def _empty_layer(self, index: int, linear: LinearFactory) -> Layer:
        with torch.device("meta"):
            return Layer(self.config, linear, index)

    def _load(self, name: str, module: nn.Module, dtype: torch.dtype | None) -> None:
        tensors = {full: self._checkpoint.load(full) for full in expected_tensors(name, module)}
        load_module(self._checkpoint, name, module, tensors, self.device, dtype)
        self._checkpoint.release()  # else the layer's pages stay mapped beside their copies
