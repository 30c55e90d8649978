"""Attention of a few queries over the ring, as it lies in memory: nothing is gathered, copied or masked.

What a query at position p sees are the positions from max(0, p − window + 1) to p, and in a ring these are one run of
slots, or two where it wraps. A task is a query of one sequence for one key head, and a part of what it sees; the query
heads that share that key head share its loads. It walks along the keys some slots at a time, as many as a vector has
lanes, with the softmax's largest score and sum so far (Milakov & Gimelshein 2018), so that scores are never in memory.
Parts are put together behind that (`combine`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils

from mistralcli.cache import Ring, Seen
from mistralcli.kernels.cpu.floats import (
    BYTES,
    NUMBERS,
    constants,
    exp,
    is_known,
    largest,
    load,
    total,
    totals,
    width_of,
)
from quant.kernels.cpu import pool
from quant.kernels.cpu.inline import inlined, read
from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.matmul import WORTH_A_THREAD
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job, take_task
from quant.kernels.cpu.tile import PREFETCH_BYTES
from quant.kernels.cpu.vectors import F32, I32, I64, Vectors

PART_SLOTS = 128
"""What a part sees at least: below, to put parts together takes longer than they save."""

STATE_BYTES = 8
"""The largest score and the sum of a part."""


def emit_attend_slots(
    builder: ir.IRBuilder,
    numbers: str,
    head_dim: int,
    k: ir.Value,
    v: ir.Value,
    slot_bytes: ir.Value,
    k_scales: ir.Value,
    v_scales: ir.Value,
    n_slots: ir.Value,
    q: ir.Value,
    n_rows: ir.Value,
    sums: ir.Value,
    state: ir.Value,
) -> None:
    """Take up to a vector's lanes of slots, n_slots ≥ 1 of them, into the softmax of n_rows ≥ 1 queries of a key head.

    Addresses: k and v of the first slot and, for "i8", of its scales; q (n_rows, head_dim) float32; sums, of values by
    weight so far, alike; state (n_rows, 2) float32, the largest score and the sum of weights so far.
    """
    w = Vectors(builder, width_of(head_dim))
    lanes, n_vectors = w.lanes, head_dim // w.lanes
    keys, values = (cgutils.alloca_once(builder, w.floats, size=lanes * n_vectors) for _ in range(2))
    keys, values = (builder.ptrtoint(one, I64) for one in (keys, values))
    last = builder.sub(n_slots, I64(1))

    def unpack(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, to = carried
        slot = builder.select(builder.icmp_signed("<", at, last), at, last)  # behind the last, that again
        for rows, scales, unpacked in ((k, k_scales, keys), (v, v_scales, values)):
            row = builder.add(rows, builder.mul(slot, slot_bytes))
            if numbers == "i8":
                scale = w.splat(w.load(F32, builder.add(scales, builder.mul(slot, I64(4)))))
            for line in range(0, head_dim * BYTES[numbers], 64):
                w.prefetch(row, PREFETCH_BYTES + line)
            for i in range(n_vectors):
                value = load(w, numbers, row, i * lanes * BYTES[numbers])
                value = builder.fmul(value, scale) if numbers == "i8" else value
                w.store(value, builder.add(unpacked, to), 4 * lanes * i)
        return [builder.add(at, I64(1)), builder.add(to, I64(4 * head_dim))]

    w.loop(I64(lanes), [I64(0), I64(0)], unpack)
    numbered = constants(w, range(lanes), I32)
    is_seen = builder.icmp_signed("<", numbered, w.splat(builder.trunc(n_slots, I32)))

    def attend(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        q_row, sums_row, own = carried
        products = []
        for slot in range(lanes):
            product = w.constant(w.floats, 0.0)
            for i in range(n_vectors):
                key = w.load(w.floats, keys, 4 * (slot * head_dim + i * lanes))
                product = w.multiply_add(w.load(w.floats, q_row, 4 * lanes * i), key, product)
            products.append(product)
        scores = builder.fmul(totals(w, products), w.constant(w.floats, 1 / math.sqrt(head_dim)))
        scores = builder.select(is_seen, scores, w.constant(w.floats, -math.inf))
        before, highest = w.load(F32, own), largest(w, scores)
        highest = builder.select(builder.fcmp_ordered(">", before, highest), before, highest)
        weights = exp(w, builder.fsub(scores, w.splat(highest)))
        weights = builder.select(is_seen, weights, w.constant(w.floats, 0.0))
        shrunk = exp(w, w.splat(builder.fsub(before, highest)))
        w.store(highest, own)
        of_all = builder.fmul(w.load(F32, own, 4), builder.extract_element(shrunk, I32(0)))
        w.store(builder.fadd(of_all, total(w, weights)), own, 4)
        of_slot = [w.shuffle(weights, [slot] * lanes) for slot in range(lanes)]
        for i in range(n_vectors):
            summed = builder.fmul(w.load(w.floats, sums_row, 4 * lanes * i), shrunk)
            for slot in range(lanes):
                value = w.load(w.floats, values, 4 * (slot * head_dim + i * lanes))
                summed = w.multiply_add(of_slot[slot], value, summed)
            w.store(summed, sums_row, 4 * lanes * i)
        row_bytes = I64(4 * head_dim)
        following = [builder.add(one, row_bytes) for one in (q_row, sums_row)]
        return [*following, builder.add(own, I64(STATE_BYTES))]

    w.loop(n_rows, [q, sums, state], attend)


def emit_begin(
    builder: ir.IRBuilder, head_dim: int, n_rows: ir.Value, sums: ir.Value, state: ir.Value
) -> None:
    """Sums and states of nothing."""
    w = Vectors(builder, width_of(head_dim))

    def begin(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        row, own = carried
        for at in range(0, head_dim, w.lanes):
            w.store(w.constant(w.floats, 0.0), row, 4 * at)
        w.store(F32(-math.inf), own)
        w.store(F32(0.0), own, 4)
        return [builder.add(row, I64(4 * head_dim)), builder.add(own, I64(STATE_BYTES))]

    w.loop(n_rows, [sums, state], begin)


def emit_combine(
    builder: ir.IRBuilder,
    head_dim: int,
    n_parts: ir.Value,
    group: ir.Value,
    sums: ir.Value,
    state: ir.Value,
    out: ir.Value,
) -> None:
    """Put the parts of a query together; out (head_dim,) float32 is zeros where nothing was seen.

    sums, state: addresses of the first part's; those of the others are `group` rows apart.
    """
    w = Vectors(builder, width_of(head_dim))
    row_bytes, state_bytes = (builder.mul(group, I64(size)) for size in (4 * head_dim, STATE_BYTES))
    n_vectors, zero = head_dim // w.lanes, w.constant(w.floats, 0.0)

    def look(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        own, highest = carried
        one = w.load(F32, own)
        higher = builder.select(builder.fcmp_ordered(">", one, highest), one, highest)
        return [builder.add(own, state_bytes), higher]

    def add(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        own, row, weight, *summed = carried
        factor = exp(w, w.splat(builder.fsub(w.load(F32, own), highest)))
        # A part that saw nothing has −∞ for its largest score, and where none saw anything −∞ − −∞ is no number.
        is_empty = builder.fcmp_ordered("==", w.load(F32, own, 4), F32(0.0))
        factor = builder.select(is_empty, zero, factor)
        weight = w.multiply_add(w.splat(w.load(F32, own, 4)), factor, weight)
        for i in range(n_vectors):
            summed[i] = w.multiply_add(w.load(w.floats, row, 4 * w.lanes * i), factor, summed[i])
        return [builder.add(own, state_bytes), builder.add(row, row_bytes), weight, *summed]

    _, highest = w.loop(n_parts, [state, F32(-math.inf)], look)
    _, _, weight, *summed = w.loop(n_parts, [state, sums, zero, *[zero] * n_vectors], add)
    nothing = builder.fcmp_ordered("==", weight, zero)
    for i in range(n_vectors):
        w.store(builder.select(nothing, zero, builder.fdiv(summed[i], weight)), out, 4 * w.lanes * i)


attend_slots, begin, combine_parts = (
    inlined(emit, n_constants)
    for emit, n_constants in ((emit_attend_slots, 2), (emit_begin, 1), (emit_combine, 1))
)
"""The same for numba."""


@functools.cache
def _attending_kernel(numbers: str, head_dim: int, isa: str, digest: str) -> int:
    """A task is a query, a key head and a part of what it sees."""
    version = f"{isa} {digest}"
    block, row_bytes, minimum = width_of(head_dim), 4 * head_dim, PART_SLOTS

    def attend(job: Any) -> None:
        assert version
        q, q_bytes, positions, n_tokens = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
        )
        keys, values, k_scales, v_scales = (
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
            job[ARGUMENTS + 7],
        )
        # Slots, not bytes, lie between sequences and heads, so that they are right for scales too.
        seq_slots, head_slots, slot_bytes = job[ARGUMENTS + 8], job[ARGUMENTS + 9], job[ARGUMENTS + 10]
        capacity, window, n_kv_heads, group, n_parts = (
            job[ARGUMENTS + 11],
            job[ARGUMENTS + 12],
            job[ARGUMENTS + 13],
            job[ARGUMENTS + 14],
            job[ARGUMENTS + 15],
        )
        sums, state = job[ARGUMENTS + 16], job[ARGUMENTS + 17]
        task = take_task(job)
        while task < job[N_TASKS]:
            part, rest = task % n_parts, task // n_parts
            head, token = rest % n_kv_heads, rest // n_kv_heads
            seq = token // n_tokens
            position = read(positions + 8 * token)
            last = position
            for other in range(seq * n_tokens, (seq + 1) * n_tokens):
                last = max(last, read(positions + 8 * other))
            first = max(0, last - capacity + 1)
            if window > 0:
                first = max(first, position - window + 1)
            length = max(minimum, -(-(position + 1 - first) // n_parts))
            at, stop = first + part * length, min(first + (part + 1) * length, position + 1)
            # Rows of a task, and of a part of all queries, lie together.
            own = ((token * n_kv_heads + head) * n_parts + part) * group
            own_sums, own_state = sums + own * row_bytes, state + own * STATE_BYTES
            begin(head_dim, group, own_sums, own_state)
            ring = seq * seq_slots + head * head_slots
            while at < stop:
                slot = at % capacity
                n_slots = min(block, min(stop - at, capacity - slot))
                attend_slots(
                    numbers,
                    head_dim,
                    keys + (ring + slot) * slot_bytes,
                    values + (ring + slot) * slot_bytes,
                    slot_bytes,
                    k_scales + (ring + slot) * 4,
                    v_scales + (ring + slot) * 4,
                    n_slots,
                    q + token * q_bytes + head * group * row_bytes,
                    group,
                    own_sums,
                    own_state,
                )
                at += n_slots
            task = take_task(job)

    return pool.kernel(attend)


@functools.cache
def _combining_kernel(head_dim: int, isa: str, digest: str) -> int:
    """A task is a query head of a token."""
    version, row_bytes = f"{isa} {digest}", 4 * head_dim

    def combine(job: Any) -> None:
        assert version
        sums, state, out, group, n_parts = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
        )
        task = take_task(job)
        while task < job[N_TASKS]:
            first = task // group * n_parts * group + task % group
            combine_parts(
                head_dim,
                n_parts,
                group,
                sums + first * row_bytes,
                state + first * STATE_BYTES,
                out + task * row_bytes,
            )
            task = take_task(job)

    return pool.kernel(combine)


def digest() -> str:
    """Of all source that the CPU's kernels are made of."""
    return pool.digest(Path(__file__).parent, Path(pool.__file__).parent)


@dataclass(frozen=True)
class Queries:
    """What asks: an address of float32 (n_seqs · n_tokens, n_heads, head_dim), bytes from token to token, and where.

    positions: the address of (n_seqs, n_tokens) int64.
    """

    address: int
    token_bytes: int
    positions: int
    n_seqs: int
    n_tokens: int
    n_heads: int


class Scratch:
    """Room for sums and states of the parts of some queries."""

    def __init__(self, n_rows: int, n_parts: int, head_dim: int) -> None:
        self.n_parts = n_parts
        self.sums = torch.empty(n_rows * n_parts * head_dim)
        self.state = torch.empty(n_rows * n_parts * 2)


def n_parts_for(n_pairs: int, n_slots: int, n_threads: int) -> int:
    """In how many parts the slots of each pair of query and key head are attended to, so that all threads have work."""
    if n_threads == 1:
        return 1
    return max(1, min(-(-4 * n_threads // n_pairs), -(-n_slots // PART_SLOTS)))


def attention_jobs(
    queries: Queries,
    k: torch.Tensor,
    v: torch.Tensor,
    ring: Ring,
    scratch: Scratch,
    out: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[Job]:
    """One after the other, they write what `queries` get to the address `out`, (n_seqs · n_tokens, n_heads, head_dim).

    k, v, scales: as `mistralcli.ops.attention` takes them, of any strides between sequences and heads.
    """
    n_kv_heads, head_dim = k.shape[1], k.shape[3]
    group, n_parts = queries.n_heads // n_kv_heads, scratch.n_parts
    n_tokens = queries.n_seqs * queries.n_tokens
    slots = (k.stride(0) // head_dim, k.stride(1) // head_dim)
    sums, state = scratch.sums.data_ptr(), scratch.state.data_ptr()
    kernel = _attending_kernel(NUMBERS[k.dtype], head_dim, chosen().name, digest())
    attend = (
        *(queries.address, queries.token_bytes, queries.positions, queries.n_tokens),
        *(k.data_ptr(), v.data_ptr()),
        *((0, 0) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr())),
        *(*slots, head_dim * k.itemsize, ring.capacity, ring.sliding_window or 0),
        *(n_kv_heads, group, n_parts, sums, state),
    )
    combine = (sums, state, out, group, n_parts)
    return [
        Job(kernel, n_tokens * n_kv_heads * n_parts, attend),
        Job(_combining_kernel(head_dim, chosen().name, digest()), n_tokens * queries.n_heads, combine),
    ]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Seen,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mistralcli.ops.attention`; `takes` must hold."""
    n_seqs, n_heads, n_tokens, head_dim = q.shape
    rows = q.transpose(1, 2).float().contiguous()  # (n_seqs, n_tokens, n_heads, head_dim)
    positions, out = seen.positions.contiguous(), torch.empty_like(rows)
    n_threads = torch.get_num_threads() if k.nbytes > WORTH_A_THREAD else 1
    n_pairs = n_seqs * n_tokens * k.shape[1]
    scratch = Scratch(n_seqs * n_tokens * n_heads, n_parts_for(n_pairs, seen.n_slots, n_threads), head_dim)
    queries = Queries(
        rows.data_ptr(), 4 * n_heads * head_dim, positions.data_ptr(), n_seqs, n_tokens, n_heads
    )
    scales = None if key_scales is None or value_scales is None else (key_scales, value_scales)
    for job in attention_jobs(queries, k, v, seen.ring, scratch, out.data_ptr(), scales):
        pool.run(job, n_threads)
    return out.transpose(1, 2).to(q.dtype)


def takes(k: torch.Tensor, v: torch.Tensor, *scales: torch.Tensor | None) -> bool:
    """Whether it knows the type, and vectors of head_dim lie slot by slot, with scales beside them, as in a cache."""
    head_dim = k.shape[3]
    same = k.stride() == v.stride() and k.stride(3) == 1 and k.stride(2) == head_dim
    beside = tuple(stride // head_dim for stride in k.stride()[:3])
    return same and is_known(k.dtype) and all(one is None or one.stride() == beside for one in scales)
