"""One decode step of all sequences on the CPU: a single program of kernels, entered once for each token.

What `Transformer.forward` and `logits` compute for one token of each sequence, which are its reference, in some 14
steps a layer that follow one another without Python between them, in one parallel region. Only `token_ids` and
`positions` change from one token to the next, in memory that the kernels read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mistralcli.cache import KVCache, LayerCache
from mistralcli.kernels.cpu.attention import Queries, Scratch, attention_jobs, n_parts_for
from mistralcli.kernels.cpu.dense import embedding_job, product_job
from mistralcli.kernels.cpu.floats import is_known
from mistralcli.kernels.cpu.pointwise import norm_job, rotary_job, swiglu_job, writing_job
from mistralcli.model import Linear, Transformer, TransformerBlock
from quant.kernels.cpu.layout import ROWS
from quant.kernels.cpu.matmul import matmul_job, rounded_bytes, rounding_job
from quant.kernels.cpu.pool import Job
from quant.kernels.cpu.program import Program
from quant.schemes.affine import AffineLinear

Step = list[Job]
"""Jobs that do not need each other."""

MOST_SEQUENCES = 16
"""More rows are left to the model's forward pass: attention here reads the keys of each sequence by itself either way,
but its dense products take a row at a time."""


def can_decode(model: Transformer, cache: KVCache) -> bool:
    """Whether `CpuDecoder` takes a model: dense layers, or int4 and int8 that were prepared for the CPU's kernels."""
    linears = [module for module in model.modules() if hasattr(module, "in_features")]
    dense = [module.weight for module in model.modules() if isinstance(module, Linear)]
    prepared = all(map(_is_prepared, linears))
    types = {cache.dtype, model.tok_embeddings.weight.dtype, *(weight.dtype for weight in dense)}
    return prepared and all(map(is_known, types)) and len(cache.last) <= MOST_SEQUENCES


def _is_prepared(linear: nn.Module) -> bool:
    return isinstance(linear, AffineLinear) and linear.interleaved is not None and linear.columns is None


@dataclass(frozen=True)
class Rows:
    """Float32 rows of `width` numbers, one for each sequence, in a buffer whose rows may be longer."""

    buffer: torch.Tensor
    width: int

    @staticmethod
    def empty(n_seqs: int, width: int) -> "Rows":
        return Rows(torch.zeros(n_seqs, -(-width // ROWS) * ROWS), width)

    @property
    def place(self) -> tuple[int, int]:
        """The address, and bytes from row to row."""
        return self.buffer.data_ptr(), self.buffer.stride(0) * self.buffer.itemsize


class CpuDecoder:
    """The next logits of the sequences that a cache holds, step after step; `can_decode` must hold."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        config, n_seqs = model.config, len(cache.last)
        self._model, self._cache = model, cache
        half = config.head_dim // 2
        self._token_ids = torch.zeros(n_seqs, dtype=torch.int64)
        self._positions = torch.zeros(n_seqs, dtype=torch.int64)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self._frequencies = config.rope_theta**-exponents
        self._cos, self._sin = (torch.empty(n_seqs, half) for _ in range(2))
        self._eps = torch.tensor([config.norm_eps])
        self._h, self._x = (torch.zeros(n_seqs, config.dim) for _ in range(2))
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self._q, self._k, self._v = (Rows.empty(n_seqs, width) for width in (q_dim, kv_dim, kv_dim))
        self._attended = torch.empty(n_seqs, q_dim)
        self._gate, self._up = (Rows.empty(n_seqs, config.hidden_dim) for _ in range(2))
        self._gated = torch.empty(n_seqs, config.hidden_dim)
        self._projected = Rows.empty(n_seqs, config.dim)
        self._logits = Rows.empty(n_seqs, config.vocab_size)
        self._rounded: dict[tuple[int, int, int], torch.Tensor] = {}
        self._norms = {name: one.float() for name, one in model.named_parameters() if one.ndim == 1}
        self._make()

    def feed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Append an id to each sequence; the logits after it, (n_seqs, vocab_size) float32, valid until the next."""
        cache = self._cache
        self._token_ids.copy_(torch.tensor(token_ids))
        torch.add(cache.last, 1, out=self._positions)
        cache.note(self._positions)
        cache.last.copy_(self._positions)
        if self._made_for != self._circumstances():
            self._make()
        self._program.run(self._n_threads)
        return self._logits.buffer[:, : self._logits.width]

    def _circumstances(self) -> tuple[int, int]:
        """What a program is made for: threads, and where the cache's buffers are."""
        return torch.get_num_threads(), sum(layer.n_moves for layer in self._cache.layers)

    def _make(self) -> None:
        """The program for the threads that there are, and for the cache's buffers where they are now."""
        model, cache = self._model, self._cache
        self._n_threads = torch.get_num_threads()
        made_for = self._circumstances()
        n_seqs, config = len(self._h), model.config
        n_parts = n_parts_for(n_seqs * config.n_kv_heads, cache.max_seq_len, self._n_threads)
        self._scratch = Scratch(n_seqs * config.n_heads, n_parts, config.head_dim)
        embedding = model.tok_embeddings.weight
        rows = (self._token_ids, self._positions, embedding, self._frequencies, self._h, self._cos, self._sin)
        steps = [[embedding_job(*rows)]]
        added = None
        for i, block in enumerate(model.layers):
            assert isinstance(block, TransformerBlock)
            steps += self._attention(f"layers.{i}", block, cache.layers[i], added)
            steps += self._feed_forward(f"layers.{i}", block)
            added = self._projected.place
        steps.append([self._norm("norm", added)])
        if model.output is None:
            steps.append([product_job(embedding, self._x.data_ptr(), self._logits.place, n_seqs)])
        else:
            steps += self._products({model.output: self._logits}, self._x)
        self._program = Program(steps)
        self._made_for = made_for  # last: what Ctrl-C interrupts is made again

    def _attention(
        self, name: str, block: TransformerBlock, cache: LayerCache, added: tuple[int, int] | None
    ) -> list[Step]:
        attention, config, n_seqs = block.attention, self._model.config, len(self._h)
        products = {attention.wq: self._q, attention.wk: self._k, attention.wv: self._v}
        cos, sin, positions = (one.data_ptr() for one in (self._cos, self._sin, self._positions))
        rotations = [
            rotary_job(rows.place, cos, sin, rows.place, n_seqs, n_heads, config.head_dim)
            for rows, n_heads in ((self._q, config.n_heads), (self._k, config.n_kv_heads))
        ]
        keys, values = (
            writing_job(rows.place, positions, 1, buffer, scales, cache.ring.capacity)
            for rows, buffer, scales in (
                (self._k, cache.keys, cache.key_scales),
                (self._v, cache.values, cache.value_scales),
            )
        )
        queries = Queries(*self._q.place, positions, n_seqs, 1, config.n_heads)
        scales = None
        if cache.key_scales is not None and cache.value_scales is not None:
            scales = (cache.key_scales, cache.value_scales)
        out = self._attended.data_ptr()
        attend = attention_jobs(queries, cache.keys, cache.values, cache.ring, self._scratch, out, scales)
        return [
            [self._norm(f"{name}.attention_norm", added)],
            *self._products(products, self._x),
            [*rotations, values],
            [keys],
            *([job] for job in attend),
            *self._products({attention.wo: self._projected}, self._attended),
        ]

    def _feed_forward(self, name: str, block: TransformerBlock) -> list[Step]:
        feed_forward, n_seqs = block.feed_forward, len(self._h)
        (gate, row_bytes), (up, _) = self._gate.place, self._up.place
        swiglu = swiglu_job(gate, up, row_bytes, self._gated.data_ptr(), n_seqs, self._gate.width)
        return [
            [self._norm(f"{name}.ffn_norm", self._projected.place)],
            *self._products({feed_forward.w1: self._gate, feed_forward.w3: self._up}, self._x),
            [swiglu],
            *self._products({feed_forward.w2: self._projected}, self._gated),
        ]

    def _norm(self, name: str, added: tuple[int, int] | None) -> Job:
        """h += added; x = RMSNorm of h."""
        weight = self._norms[f"{name}.weight"]
        return norm_job(self._h.data_ptr(), added, weight, self._eps, self._x.data_ptr(), len(self._h))

    def _products(self, outputs: Mapping[nn.Module, Rows], x: torch.Tensor) -> list[Step]:
        """x (n_seqs, in_features) times each weight; what reads it rounded finds it rounded once for all alike."""
        roundings: dict[int, Job] = {}
        products = []
        for linear, y in outputs.items():
            if isinstance(linear, Linear):
                products.append(product_job(linear.weight, x.data_ptr(), y.place, len(x)))
                continue
            assert isinstance(linear, AffineLinear) and linear.interleaved is not None
            weight = linear.interleaved
            kind = (weight.in_features, weight.bits, weight.x_unit)
            size = (len(x), rounded_bytes(weight))
            rounded = self._rounded.setdefault(kind, torch.empty(size, dtype=torch.uint8)).data_ptr()
            roundings[rounded] = rounding_job(x.data_ptr(), rounded, len(x), weight)
            products.append(matmul_job(rounded, len(x), weight, y.place[0], self._n_threads))
        return [list(roundings.values()), products] if roundings else [products]
