"""A model's hidden states on a text, one layer after the other: what methods with data look at (`quant.method`)."""

import errno
import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mistralcli.errors import IntegrityError
from mistralcli.layerwise import LayerwiseModel
from quant.memory import BATCH_TOKENS
from quant.method import Observe


class LayerwiseCalibration:
    """The hidden states of a model on `token_ids` (n_seqs, n_tokens), before the layer that comes next.

    They take n_seqs · n_tokens · dim · the size of the model's dtype, on its device, beside one layer in that dtype
    and the activations of `BATCH_TOKENS` tokens (or of one sequence, if that is longer).
    """

    def __init__(self, model: LayerwiseModel, token_ids: torch.Tensor, text: str) -> None:
        """`text` is the name of what the ids are from."""
        n_seqs, n_tokens = token_ids.shape
        self.description: Mapping[str, Any] = {
            "text": text,
            "sha256": hashlib.sha256(token_ids.to(torch.int64).numpy().tobytes()).hexdigest(),
            "n_seqs": n_seqs,
            "n_tokens": n_tokens,
        }
        self.head_dim = model.config.head_dim
        self._model = model
        self._hidden = model.embed(token_ids)  # (n_seqs, n_tokens, dim)
        self._n_batch = max(1, BATCH_TOKENS // n_tokens)

    @torch.no_grad()
    def run(
        self, index: int, weights: Mapping[str, torch.Tensor], names: Collection[str], observe: Observe
    ) -> None:
        """Let `observe` see what the linears of `names` are given in layer `index` with these weights."""
        layer = self._model.layer_from(index, weights)
        unseen: set[str] = set()
        for name, module in layer.tensor_modules().items():
            if f"{name}.weight" in names:
                module.register_forward_pre_hook(partial(_see, f"{name}.weight", unseen, observe))
        for hidden in self._hidden.split(self._n_batch):
            unseen.update(names)
            try:
                self._model.run_layer(layer, hidden)
            except _SeenAllError:
                continue

    @torch.no_grad()
    def advance(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Let the hidden states be the output of layer `index` with these weights."""
        layer = self._model.layer_from(index, weights)
        for hidden in self._hidden.split(self._n_batch):
            hidden.copy_(self._model.run_layer(layer, hidden))

    def save(self, path: Path) -> None:
        """Write the hidden states, bit for bit, in safetensors' format. Raises OSError where they cannot be written."""
        try:
            save_file({"hidden": self._hidden}, path, metadata={"sha256": self.description["sha256"]})
        except SafetensorError as error:  # which says what the system said, in words only
            raise OSError(errno.EIO, str(error), str(path)) from error

    def restore(self, path: Path) -> None:
        """Take the hidden states that `save` wrote for the same text and model."""
        try:
            with safe_open(path, "pt") as file:
                text, hidden = (file.metadata() or {}).get("sha256"), file.get_tensor("hidden")
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}", "start the build afresh") from error
        mine = self._hidden
        if text != self.description["sha256"] or (hidden.shape, hidden.dtype) != (mine.shape, mine.dtype):
            raise IntegrityError(
                f"{path} holds the hidden states of another text or model",
                "start the build afresh, or name the text it was begun with",
            )
        self._hidden.copy_(hidden)


class _SeenAllError(Exception):
    """All that was to be observed of a batch has been; the rest of the layer need not be computed."""


def _see(name: str, unseen: set[str], observe: Observe, module: nn.Module, args: tuple[torch.Tensor]) -> None:
    """A hook in front of a linear, called with its input (n_seqs, n_tokens, in_features)."""
    observe(name, args[0].flatten(0, 1))
    unseen.discard(name)
    if not unseen:
        raise _SeenAllError
