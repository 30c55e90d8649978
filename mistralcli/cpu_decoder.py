"""Some tokens of some sequences on the CPU: a single program of kernels, entered once for a decode step of all.

What `Transformer.forward` and `logits` compute, which are its reference, in some 14 steps a layer that follow one
another without Python between them, in one parallel region. A row is a token, of whichever sequence: the next one of
each, a short prompt, or several prompts side by side. Only ids and places change from one call to the next, in memory
that the kernels read, and the number of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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

MOST_SEQUENCES = 64
"""More rows are left to the model's forward pass."""

MOST_ROWS = 128
"""Rows that go through together where several tokens of a sequence do."""

SHORT = 512
"""Positions up to which several tokens of a sequence go through here. A query walks along the keys by itself, while the
forward pass multiplies tiles of queries but enters some 16 parallel regions a layer. A prompt of so many tokens takes
0.73 s here and 0.94 there (SmolLM2, one thread of an EPYC), 3.4 and 3.9 s in the shapes of a model of 1.0 billion.
"""


def can_decode(model: Transformer, cache: KVCache) -> bool:
    """Whether `CpuDecoder` takes a model: dense layers, or int4 and int8 that were prepared for the CPU's kernels."""
    linears = [module for module in model.modules() if hasattr(module, "in_features")]
    types = {
        cache.dtype,
        model.tok_embeddings.weight.dtype,
        *(one.weight.dtype for one in _dense_layers(model)),
    }
    prepared = all(map(_is_prepared, linears))
    return prepared and all(map(is_known, types)) and len(cache.last) <= MOST_SEQUENCES


def _dense_layers(model: Transformer) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def _is_prepared(linear: nn.Module) -> bool:
    return isinstance(linear, AffineLinear) and linear.interleaved is not None and linear.columns is None


@dataclass(frozen=True)
class Rows:
    """Float32 rows of `width` numbers, one for each token, in a buffer whose rows may be longer."""

    buffer: torch.Tensor
    width: int

    @staticmethod
    def empty(n_rows: int, width: int) -> "Rows":
        return Rows(torch.zeros(n_rows, -(-width // ROWS) * ROWS), width)

    @property
    def place(self) -> tuple[int, int]:
        """The address, and bytes from row to row."""
        return self.buffer.data_ptr(), self.buffer.stride(0) * self.buffer.itemsize


@dataclass(frozen=True)
class Attending:
    """Where the queries of a call keep what they have summed, and in how many parts each sees what it sees."""

    scratch: Scratch
    n_parts: int


class CpuDecoder:
    """Appends tokens to the sequences that a cache holds, and gives the logits behind them; `can_decode` must hold."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        config, n_seqs = model.config, len(cache.last)
        self._model, self._cache = model, cache
        self._most_rows = n_seqs if _dense_layers(model) else max(n_seqs, MOST_ROWS)
        n_rows, half = self._most_rows, config.head_dim // 2
        self._token_ids = torch.zeros(n_rows, dtype=torch.int64)
        self._places = torch.zeros(n_rows, 3, dtype=torch.int64)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self._frequencies = config.rope_theta**-exponents
        # What is never written takes no memory: the system gives it page by page.
        self._cos, self._sin = (torch.empty(n_rows, half) for _ in range(2))
        self._eps = torch.tensor([config.norm_eps])
        self._h, self._x = (torch.zeros(n_rows, config.dim) for _ in range(2))
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self._q, self._k, self._v = (Rows.empty(n_rows, width) for width in (q_dim, kv_dim, kv_dim))
        self._attended = torch.empty(n_rows, q_dim)
        self._gate, self._up = (Rows.empty(n_rows, config.hidden_dim) for _ in range(2))
        self._gated = torch.empty(n_rows, config.hidden_dim)
        self._projected = Rows.empty(n_rows, config.dim)
        self._last_x = torch.zeros(n_seqs, config.dim)
        self._logits = Rows.empty(n_seqs, config.vocab_size)
        self._rounded: dict[tuple[int, int, int], torch.Tensor] = {}
        self._norms = {name: one.float() for name, one in model.named_parameters() if one.ndim == 1}
        self._make()

    def takes(self, n_tokens: int, n_positions: int) -> bool:
        """Whether to append so many tokens, up to that position, is better done here than by the forward pass."""
        return n_tokens == 1 or (n_positions <= SHORT and self._most_rows >= MOST_ROWS)

    def append(self, token_ids: Mapping[int, Sequence[int]]) -> torch.Tensor:
        """Append ids to sequences, by index; the logits after the last id of each, in the order given.

        (len(token_ids), vocab_size) float32, valid until the next call. What a token comes to depends on those before
        it in its sequence alone, to the last bit, and not on what else is in a call. `takes` must hold of several ids.
        """
        if all(len(ids) == 1 for ids in token_ids.values()):
            self._put(token_ids)
            self._step.run(self._n_threads, len(token_ids))
        else:
            order = {index: at for at, index in enumerate(token_ids)}
            for piece in self._pieces(token_ids):
                self._put(piece)
                ends = list(accumulate(len(ids) for ids in piece.values()))
                self._layers.run(self._n_threads, ends[-1])
                self._last_x[[order[index] for index in piece]] = self._x[[end - 1 for end in ends]]
            self._head.run(self._n_threads, len(token_ids))
        return self._logits.buffer[: len(token_ids), : self._logits.width]

    def _pieces(self, token_ids: Mapping[int, Sequence[int]]) -> Iterator[dict[int, Sequence[int]]]:
        """Ids in their order, shared out into calls: as many as there are rows for, of a sequence the slack at most."""
        piece: dict[int, Sequence[int]] = {}
        room = self._most_rows
        for index, ids in token_ids.items():
            n_done = 0
            while n_done < len(ids):
                n_now = min(len(ids) - n_done, room, self._cache.slack)
                piece[index] = ids[n_done : n_done + n_now]
                n_done, room = n_done + n_now, room - n_now
                if room == 0 or n_done < len(ids):
                    yield piece
                    piece, room = {}, self._most_rows
        if piece:
            yield piece

    def _put(self, piece: Mapping[int, Sequence[int]]) -> None:
        """Write ids and places to where the kernels read them, one row after the other, and make room in the cache."""
        cache, last, places = self._cache, self._cache.last.tolist(), []
        for index, ids in piece.items():
            start, last[index] = last[index] + 1, last[index] + len(ids)
            places += [(position, index, last[index]) for position in range(start, start + len(ids))]
        self._token_ids[: len(places)] = torch.tensor([one for ids in piece.values() for one in ids])
        self._places[: len(places)] = torch.tensor(places)
        cache.note(self._places[: len(places), 0])
        cache.last.copy_(torch.tensor(last))
        if self._made_for != self._circumstances():
            self._make()

    def _circumstances(self) -> tuple[int, int]:
        """What a program is made for: threads, and where the cache's buffers are."""
        return torch.get_num_threads(), sum(layer.n_moves for layer in self._cache.layers)

    def _make(self) -> None:
        """The programs for the threads that there are, and for the cache's buffers where they are now."""
        config, n_seqs = self._model.config, len(self._cache.last)
        self._n_threads = torch.get_num_threads()
        made_for = self._circumstances()
        n_slots, heads = self._cache.max_seq_len, (config.n_heads, config.head_dim)
        next_ones = Attending(
            Scratch(n_seqs, *heads, n_slots),
            n_parts_for(n_seqs * config.n_kv_heads, n_slots, self._n_threads),
        )
        chunk = Attending(Scratch(self._most_rows, *heads, SHORT), n_parts=1)
        self._step = Program(*(self._all_layers(n, next_ones) + self._logits_of(n, self._x) for n in (0, 1)))
        self._layers = Program(*(self._all_layers(n, chunk) for n in (0, 1)))
        self._head = Program(*(self._logits_of(n, self._last_x) for n in (0, 1)))
        self._scratch = next_ones, chunk  # whose memory the programs have
        self._made_for = made_for  # last: what Ctrl-C interrupts is made again

    def _all_layers(self, n_rows: int, attending: Attending) -> list[Step]:
        """From ids and places to x, the normalized hidden states."""
        model = self._model
        tables = (self._token_ids, self._places, model.tok_embeddings.weight, self._frequencies)
        steps = [[embedding_job(n_rows, *tables, self._h, self._cos, self._sin)]]
        added = None
        for i, block in enumerate(model.layers):
            assert isinstance(block, TransformerBlock)
            steps += self._attention(n_rows, f"layers.{i}", block, self._cache.layers[i], added, attending)
            steps += self._feed_forward(n_rows, f"layers.{i}", block)
            added = self._projected.place
        return [*steps, [self._norm(n_rows, "norm", added)]]

    def _logits_of(self, n_rows: int, x: torch.Tensor) -> list[Step]:
        model = self._model
        if model.output is not None:
            return self._products(n_rows, {model.output: self._logits}, x)
        table = model.tok_embeddings.weight
        return [[product_job(table, x.data_ptr(), self._logits.place, n_rows, self._n_threads)]]

    def _attention(
        self,
        n_rows: int,
        name: str,
        block: TransformerBlock,
        cache: LayerCache,
        added: tuple[int, int] | None,
        attending: Attending,
    ) -> list[Step]:
        attention, config = block.attention, self._model.config
        products = {attention.wq: self._q, attention.wk: self._k, attention.wv: self._v}
        cos, sin, places = (one.data_ptr() for one in (self._cos, self._sin, self._places))
        rotations = [
            rotary_job(rows.place, cos, sin, rows.place, n_rows, n_heads, config.head_dim)
            for rows, n_heads in ((self._q, config.n_heads), (self._k, config.n_kv_heads))
        ]
        keys, values = (
            writing_job(rows.place, places, n_rows, buffer, scales, cache.ring.capacity)
            for rows, buffer, scales in (
                (self._k, cache.keys, cache.key_scales),
                (self._v, cache.values, cache.value_scales),
            )
        )
        queries = Queries(*self._q.place, places, n_rows, config.n_heads)
        scales = None
        if cache.key_scales is not None and cache.value_scales is not None:
            scales = (cache.key_scales, cache.value_scales)
        out = self._attended.data_ptr()
        scratch, n_parts = attending.scratch, attending.n_parts
        attend = attention_jobs(queries, cache.keys, cache.values, cache.ring, scratch, n_parts, out, scales)
        return [
            [self._norm(n_rows, f"{name}.attention_norm", added)],
            *self._products(n_rows, products, self._x),
            [*rotations, values],
            [keys],
            *([job] for job in attend),
            *self._products(n_rows, {attention.wo: self._projected}, self._attended),
        ]

    def _feed_forward(self, n_rows: int, name: str, block: TransformerBlock) -> list[Step]:
        feed_forward = block.feed_forward
        (gate, row_bytes), (up, _) = self._gate.place, self._up.place
        swiglu = swiglu_job(gate, up, row_bytes, self._gated.data_ptr(), n_rows, self._gate.width)
        return [
            [self._norm(n_rows, f"{name}.ffn_norm", self._projected.place)],
            *self._products(n_rows, {feed_forward.w1: self._gate, feed_forward.w3: self._up}, self._x),
            [swiglu],
            *self._products(n_rows, {feed_forward.w2: self._projected}, self._gated),
        ]

    def _norm(self, n_rows: int, name: str, added: tuple[int, int] | None) -> Job:
        """h += added; x = RMSNorm of h."""
        weight = self._norms[f"{name}.weight"]
        return norm_job(self._h.data_ptr(), added, weight, self._eps, self._x.data_ptr(), n_rows)

    def _products(self, n_rows: int, outputs: Mapping[nn.Module, Rows], x: torch.Tensor) -> list[Step]:
        """x (n_rows, in_features) times each weight; what reads it rounded finds it rounded once for all alike."""
        roundings: dict[int, Job] = {}
        products = []
        for linear, y in outputs.items():
            if isinstance(linear, Linear):
                products.append(product_job(linear.weight, x.data_ptr(), y.place, n_rows, self._n_threads))
                continue
            assert isinstance(linear, AffineLinear) and linear.interleaved is not None
            weight = linear.interleaved
            kind = (weight.in_features, weight.bits, weight.x_unit)
            size = (self._most_rows, rounded_bytes(weight))
            rounded = self._rounded.setdefault(kind, torch.empty(size, dtype=torch.uint8)).data_ptr()
            roundings[rounded] = rounding_job(x.data_ptr(), rounded, n_rows, weight)
            products.append(matmul_job(rounded, n_rows, weight, y.place[0], self._n_threads))
        return [list(roundings.values()), products] if roundings else [products]
