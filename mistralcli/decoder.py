"""One decode step of all sequences as a CUDA graph: ids, positions and the sampler's state stay on the device.

A step is an embedding, five launches for each layer, the head and the sampler. It computes what `Transformer.forward`
does for one token of each sequence, which is its reference.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mistralcli.cache import KVCache, LayerCache
from mistralcli.config import ModelConfig
from mistralcli.kernels.decode_attention import Scratch, decode_attention
from mistralcli.kernels.embed import embed
from mistralcli.kernels.sample import DeviceSampler, Params
from mistralcli.model import Linear, Transformer, TransformerBlock
from quant.kernels.activations import BLOCK, TENSOR_CORE_ROWS, Activations
from quant.kernels.matmul import ROUNDINGS
from quant.kernels.matvec import MOST_ROWS, Weight, matvec
from quant.schemes.affine import AffineLinear


@dataclass(frozen=True)
class LayerWeights:
    """A layer's matrices with those of the same input joined: q, k and v; gate and up."""

    attention_norm: torch.Tensor
    qkv: Weight
    output: Weight
    ffn_norm: torch.Tensor
    gate_up: Weight
    down: Weight

    @staticmethod
    def of(block: TransformerBlock) -> "LayerWeights":
        attention, feed_forward = block.attention, block.feed_forward
        return LayerWeights(
            block.attention_norm.weight,
            _joined([attention.wq, attention.wk, attention.wv]),
            _joined([attention.wo]),
            block.ffn_norm.weight,
            _joined([feed_forward.w1, feed_forward.w3]),
            _joined([feed_forward.w2]),
        )


def can_decode(model: Transformer, n_seqs: int) -> bool:
    """Whether `Decoder` takes a model: dense, int4 or int8 layers of sizes that its kernels know."""
    config = model.config
    sizes = (
        config.dim,
        config.hidden_dim,
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
    )
    head_dim_fits = config.head_dim >= BLOCK and config.head_dim.bit_count() == 1
    linears = [module for module in model.modules() if _is_linear(module)]
    known = all(map(_is_known, linears))
    if n_seqs > MOST_ROWS or not known or not head_dim_fits or any(size % BLOCK for size in sizes):
        return False
    return all(_weight(module).supported for module in linears) and all(map(_can_join, _blocks(model)))


class Decoder:
    """The next tokens of `n_seqs` sequences that a cache holds, step after step.

    `token_ids` (n_seqs,) int64 on the device is what a step reads and where it leaves the ids that it chose;
    `logits` (n_seqs, vocab_size) float32 are those of the last step.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        """Joins the model's matrices in place, so that they take no memory twice, and captures the step.

        The cache must be empty. `can_decode` must hold.
        """
        config, device = model.config, cache.last.device
        n_seqs = len(cache.last)
        cache.reserve(cache.max_seq_len)  # a graph holds the addresses of the buffers
        self._cache = cache
        self._layers = [LayerWeights.of(block) for block in _blocks(model)]
        self._embedding = model.tok_embeddings.weight
        self._norm = model.norm.weight
        self._head = Weight.dense(self._embedding) if model.output is None else _joined([model.output])
        exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float64) / config.head_dim
        self._frequencies = config.rope_theta**-exponents
        self._scratch = Scratch.empty(n_seqs, config.n_heads, config.n_kv_heads, config.head_dim, device)
        self._buffers = _Buffers(config, n_seqs, device)
        # Launches ahead of time help where one row leaves multiprocessors idle; with several they take them away.
        has_pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._pdl = has_pdl and n_seqs < TENSOR_CORE_ROWS
        self.token_ids = torch.zeros(n_seqs, dtype=torch.int64, device=device)
        self.logits = torch.empty(n_seqs, config.vocab_size, device=device)
        self.sampler = DeviceSampler(n_seqs, config.vocab_size, device)
        self._graph = self._capture() if device.type == "cuda" else None

    def step(self) -> None:
        """Put `token_ids` behind what the cache holds, and replace them by the sampler's choice of what follows."""
        self._cache.advance()
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    def feed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """A step with these ids instead; the logits after them, (n_seqs, vocab_size), valid until the next step."""
        self.token_ids.copy_(torch.tensor(token_ids))
        self.step()
        return self.logits

    def choose_first(
        self, index: int, logits: torch.Tensor, params: Params, seed: int, token_ids: Collection[int]
    ) -> None:
        """Choose the id that follows a sequence's `token_ids`, by logits (vocab_size,) float32.

        Steps choose the ids behind it, with the same parameters. Nothing here and below waits for the device.
        """
        self.sampler.set_sequence(index, params, seed, token_ids)
        self.sampler.sample(logits[None].contiguous(), self.token_ids, first=index)

    def put(self, token_ids: Mapping[int, int]) -> None:
        """Have the next step read these ids of some sequences, by index, instead of those that were chosen."""
        pairs = torch.tensor([list(token_ids), list(token_ids.values())], dtype=torch.int64)
        indices, ids = pairs.to(self.token_ids.device, non_blocking=True)
        self.token_ids.index_copy_(0, indices, ids)

    def rest(self, indices: Collection[int]) -> None:
        """Forget what some sequences hold, so that the next step has the least to attend to."""
        if indices:
            at = torch.tensor(list(indices), dtype=torch.int64).to(self.token_ids.device, non_blocking=True)
            self._cache.last.index_fill_(0, at, 0)

    def read(self) -> "Reading":
        """Begin to read `token_ids`; steps may be launched before it has ended."""
        return Reading(self.token_ids)

    def _capture(self) -> torch.cuda.CUDAGraph:
        self._launch()  # compiles the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch()
        self._cache.last.fill_(-1)
        return graph

    def _launch(self) -> None:
        own, cache = self._buffers, self._cache
        embed(
            self.token_ids,
            cache.last,
            self._embedding,
            self._frequencies,
            self._layers[0].attention_norm,
            own.positions,
            own.cos,
            own.sin,
            own.h,
            own.behind_norm("attention", self._layers[0].qkv),
        )
        cache.last.copy_(own.positions)
        for i, (layer, layer_cache) in enumerate(zip(self._layers, cache.layers, strict=True)):
            self._launch_attention(layer, layer_cache)
            if i + 1 < len(self._layers):
                following = self._layers[i + 1]
                next_x = own.behind_norm("attention", following.qkv)
                self._launch_feed_forward(layer, following.attention_norm, next_x)
            else:
                self._launch_feed_forward(layer, self._norm, own.behind_norm("head", self._head))
        matvec(own.behind_norm("head", self._head), self._head, self.logits, pdl=self._pdl)
        self.sampler.sample(self.logits, self.token_ids, pdl=self._pdl)

    def _launch_attention(self, layer: LayerWeights, cache: LayerCache) -> None:
        own, pdl = self._buffers, self._pdl
        matvec(own.behind_norm("attention", layer.qkv), layer.qkv, own.qkv, pdl=pdl)
        attended = own.activations("attended", layer.output)
        decode_attention(
            own.qkv,
            own.cos,
            own.sin,
            cache.keys,
            cache.values,
            own.positions,
            self._scratch,
            attended,
            cache.ring,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
            pdl=pdl,
        )
        matvec(
            attended,
            layer.output,
            own.h,
            epilogue="add_and_pack",
            norm_weight=layer.ffn_norm,
            next_x=own.behind_norm("feed forward", layer.gate_up),
            counters=own.counters,
            pdl=pdl,
        )

    def _launch_feed_forward(self, layer: LayerWeights, next_norm: torch.Tensor, next_x: Activations) -> None:
        """The second half of a block; `next_norm` and `next_x` belong to what comes behind it."""
        own, pdl = self._buffers, self._pdl
        gated = own.activations("gated", layer.down)
        matvec(
            own.behind_norm("feed forward", layer.gate_up),
            layer.gate_up,
            own.hidden,
            epilogue="swiglu_and_pack",
            next_x=gated,
            counters=own.counters,
            pdl=pdl,
        )
        matvec(
            gated,
            layer.down,
            own.h,
            epilogue="add_and_pack",
            norm_weight=next_norm,
            next_x=next_x,
            counters=own.counters,
            pdl=pdl,
        )


class Reading:
    """Ids on their way from the device to the host, behind which the device goes on."""

    def __init__(self, token_ids: torch.Tensor) -> None:
        on_cuda = token_ids.is_cuda
        self._host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=on_cuda)
        self._host.copy_(token_ids, non_blocking=True)
        self._done = torch.cuda.Event() if on_cuda else None
        if self._done is not None:
            self._done.record()

    def wait(self) -> list[int]:
        """The ids of all sequences, negative where none could be chosen."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


class _Buffers:
    """What is handed from launch to launch, at fixed addresses.

    positions: (n_seqs,) int64; cos, sin: (n_seqs, head_dim / 2); h: the residual stream (n_seqs, dim); qkv; hidden:
    SwiGLU's output (n_seqs, hidden_dim); all float32. Activations are made when first asked for, by what reads them.
    """

    def __init__(self, config: ModelConfig, n_seqs: int, device: torch.device) -> None:
        def floats(width: int) -> torch.Tensor:
            return torch.empty(n_seqs, width, device=device)

        self.positions = torch.zeros(n_seqs, dtype=torch.int64, device=device)
        self.cos, self.sin = floats(config.head_dim // 2), floats(config.head_dim // 2)
        self.h = floats(config.dim)
        self.qkv = floats((config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.hidden = floats(config.hidden_dim)
        n_blocks = max(config.dim, config.hidden_dim) // BLOCK
        self.counters = torch.zeros(n_blocks, dtype=torch.int32, device=device)
        self._eps = config.norm_eps
        self._made: dict[tuple[str, int], Activations] = {}

    def activations(self, place: str, weight: Weight) -> Activations:
        """Those that `weight` reads at a place in the block."""
        key = (place, weight.bits)
        if key not in self._made:
            rounding = ROUNDINGS[weight.bits]
            self._made[key] = Activations.empty(
                len(self.h), weight.in_features, weight.bits, rounding, self.h.device
            )
        return self._made[key]

    def behind_norm(self, place: str, weight: Weight) -> Activations:
        """The same behind an RMSNorm, which the product finishes."""
        key = (place, weight.bits)
        if key not in self._made:
            self._made[key] = self.activations(place, weight).before_norm(self._eps)
        return self._made[key]


def _blocks(model: Transformer) -> list[TransformerBlock]:
    return [block for block in model.layers if isinstance(block, TransformerBlock)]


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or isinstance(module, Linear)


def _is_known(module: nn.Module) -> bool:
    """Dense, or int4 or int8 with its columns in order."""
    return isinstance(module, Linear) or (isinstance(module, AffineLinear) and module.columns is None)


def _weight(module: nn.Module) -> Weight:
    if isinstance(module, AffineLinear):
        return Weight.quantized(module.qweight, module.scales, module.zeros, module.scheme.bits)
    assert isinstance(module, Linear)
    return Weight.dense(module.weight)


def _can_join(block: TransformerBlock) -> bool:
    """Whether the matrices that `LayerWeights` joins are stored alike."""
    attention, feed_forward = block.attention, block.feed_forward
    groups = ([attention.wq, attention.wk, attention.wv], [feed_forward.w1, feed_forward.w3])
    return all(len({_kind(module) for module in group}) == 1 for group in groups)


def _kind(module: nn.Module) -> tuple[object, ...]:
    weight = _weight(module)
    return weight.bits, weight.scales.shape[1], weight.words.dtype, weight.scales.dtype, weight.zeros is None


def _joined(modules: Sequence[nn.Module]) -> Weight:
    """The modules' weights, one below the other, in memory that the modules share from now on."""
    parts = [_weight(module) for module in modules]
    if len(parts) == 1:
        return parts[0]
    words = torch.cat([part.words for part in parts])
    if parts[0].bits == 16:
        joined = Weight.dense(words)
    else:
        zeros = [part.zeros for part in parts if part.zeros is not None]
        scales = torch.cat([part.scales for part in parts])
        joined = Weight(words, scales, torch.cat(zeros) if zeros else None, parts[0].bits)
    start = 0
    for module, part in zip(modules, parts, strict=True):
        _share(module, joined, slice(start, start + part.out_features))
        start += part.out_features
    return joined


def _share(module: nn.Module, joined: Weight, rows: slice) -> None:
    """Make rows of a joined weight the module's own, in place of the copy that it had."""
    if isinstance(module, AffineLinear):
        module.qweight = joined.words[rows].view(torch.uint8)
        module.scales = joined.scales[rows]
        module.zeros = None if joined.zeros is None else joined.zeros[rows]
    else:
        module.weight = nn.Parameter(joined.words[rows], requires_grad=False)
