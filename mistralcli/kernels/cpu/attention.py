"""Attention of a few queries over the ring, as it lies in memory: nothing is gathered, copied or masked.

What a query at position p sees are the positions from max(0, p − window + 1) to p, and in a ring these are one run of
slots, or two where it wraps. A task is a query of one sequence for one key head, and a part of what it sees; the query
heads that share that key head share its loads. It walks along the keys some slots at a time, as many as a vector has
lanes, with the softmax's largest score and sum so far (Milakov & Gimelshein 2018), so that scores are never in memory.

Every `SEGMENT` slots, counted from the first that is seen, it begins anew, and the segments are put together behind
that (`combine`). So what comes out does not depend on how many threads share a query, nor on the queries beside it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir

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
from quant.kernels.cpu.machine_code import Code, kernel
from quant.kernels.cpu.matmul import WORTH_A_THREAD
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job
from quant.kernels.cpu.vectors import F32, I32, I64, Vectors

SEGMENT = 128
"""Slots of a segment; parts are whole segments. With fewer, to put them together would take longer than parts save."""

STATE_BYTES = 8
"""The largest score and the sum of a segment."""

PLACE_BYTES = 24
"""Of a token: its position, its sequence, and the last position that is written in that."""


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
    from numba.core import cgutils

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
                w.prefetch(row, line)
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
    n_segments: ir.Value,
    group: ir.Value,
    sums: ir.Value,
    state: ir.Value,
    out: ir.Value,
) -> None:
    """Put the segments of a query together; out (head_dim,) float32 is zeros where nothing was seen.

    sums, state: addresses of the first segment's; those of the others are `group` rows apart.
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
        # A segment that saw nothing has −∞ for its largest score, and where none saw anything −∞ − −∞ is no number.
        is_empty = builder.fcmp_ordered("==", w.load(F32, own, 4), F32(0.0))
        factor = builder.select(is_empty, zero, factor)
        weight = w.multiply_add(w.splat(w.load(F32, own, 4)), factor, weight)
        for i in range(n_vectors):
            summed[i] = w.multiply_add(w.load(w.floats, row, 4 * w.lanes * i), factor, summed[i])
        return [builder.add(own, state_bytes), builder.add(row, row_bytes), weight, *summed]

    _, highest = w.loop(n_segments, [state, F32(-math.inf)], look)
    _, _, weight, *summed = w.loop(n_segments, [state, sums, zero, *[zero] * n_vectors], add)
    nothing = builder.fcmp_ordered("==", weight, zero)
    for i in range(n_vectors):
        w.store(builder.select(nothing, zero, builder.fdiv(summed[i], weight)), out, 4 * w.lanes * i)


def _first_seen(position: int, last: int, capacity: int, window: int) -> int:
    """The first position that a query sees of a ring that `last` was written to last; window 0 is none."""
    first = max(0, last - capacity + 1)
    return max(first, position - window + 1) if window > 0 else first


def _n_segments(position: int, first: int) -> int:
    """One at least, which padding sees nothing of."""
    return max(1, -(-(position + 1 - first) // SEGMENT))


def _attending_kernel(numbers: str, head_dim: int) -> Code:
    """A task is a query, a key head and a part of what it sees."""
    from quant.kernels.cpu.inline import inlined, njit, read, take_task

    first_seen, n_segments_of = njit(_first_seen), njit(_n_segments)
    begin, attend_slots = inlined(emit_begin, n_constants=1), inlined(emit_attend_slots, n_constants=2)
    block, row_bytes = width_of(head_dim), 4 * head_dim

    def attend(job: Any) -> None:
        q, q_bytes, places = job[ARGUMENTS], job[ARGUMENTS + 1], job[ARGUMENTS + 2]
        keys, values, k_scales, v_scales = (
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
        )
        # Slots, not bytes, lie between sequences and heads, so that they are right for scales too.
        seq_slots, head_slots, slot_bytes = job[ARGUMENTS + 7], job[ARGUMENTS + 8], job[ARGUMENTS + 9]
        capacity, window, n_kv_heads, group, n_parts = (
            job[ARGUMENTS + 10],
            job[ARGUMENTS + 11],
            job[ARGUMENTS + 12],
            job[ARGUMENTS + 13],
            job[ARGUMENTS + 14],
        )
        sums, state, most_segments = job[ARGUMENTS + 15], job[ARGUMENTS + 16], job[ARGUMENTS + 17]
        task = take_task(job)
        while task < job[N_TASKS]:
            part, rest = task % n_parts, task // n_parts
            head, token = rest % n_kv_heads, rest // n_kv_heads
            place = places + token * PLACE_BYTES
            position, seq = read(place), read(place + 8)
            first = first_seen(position, read(place + 16), capacity, window)
            n_segments = n_segments_of(position, first)
            per_part = -(-n_segments // n_parts)
            ring = seq * seq_slots + head * head_slots
            for segment in range(part * per_part, min((part + 1) * per_part, n_segments)):
                # Rows of a segment, and then of a query, lie together.
                own = ((token * n_kv_heads + head) * most_segments + segment) * group
                own_sums, own_state = sums + own * row_bytes, state + own * STATE_BYTES
                begin(head_dim, group, own_sums, own_state)
                at = first + segment * SEGMENT
                stop = min(at + SEGMENT, position + 1)
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

    return attend


def _combining_kernel(head_dim: int) -> Code:
    """A task is a query head of a token."""
    from quant.kernels.cpu.inline import inlined, njit, read, take_task

    first_seen, n_segments_of = njit(_first_seen), njit(_n_segments)
    combine_segments, row_bytes = inlined(emit_combine, n_constants=1), 4 * head_dim

    def combine(job: Any) -> None:
        sums, state, most_segments, out, group = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
        )
        places, n_heads, capacity, window = (
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
            job[ARGUMENTS + 7],
            job[ARGUMENTS + 8],
        )
        task = take_task(job)
        while task < job[N_TASKS]:
            place = places + task // n_heads * PLACE_BYTES
            position = read(place)
            n_segments = n_segments_of(position, first_seen(position, read(place + 16), capacity, window))
            first = task // group * most_segments * group + task % group
            combine_segments(
                head_dim,
                n_segments,
                group,
                sums + first * row_bytes,
                state + first * STATE_BYTES,
                out + task * row_bytes,
            )
            task = take_task(job)

    return combine


@functools.lru_cache(maxsize=4)
def places(seen: Seen) -> torch.Tensor:
    """Position, sequence and the sequence's last position of every token, (n_seqs · n_tokens, 3) int64.

    Made once for all layers of a ring.
    """
    positions = seen.positions
    sequences = torch.arange(len(positions))[:, None].expand_as(positions)
    last = positions.amax(1, keepdim=True).expand_as(positions)
    return torch.stack((positions, sequences, last), dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class Queries:
    """What asks: an address of float32 (n_tokens, n_heads, head_dim), bytes from token to token, and where.

    places: the address of (n_tokens, 3) int64, as of `places`.
    """

    address: int
    token_bytes: int
    places: int
    n_tokens: int
    n_heads: int


class Scratch:
    """Room for sums and states of the segments of some queries, of n_heads and up to n_slots slots that they see."""

    def __init__(self, n_tokens: int, n_heads: int, head_dim: int, n_slots: int) -> None:
        self.most_segments = max(1, -(-n_slots // SEGMENT))  # as `n_segments_of`: padding alone sees no slot
        n_rows = n_tokens * n_heads * self.most_segments
        self.sums = torch.empty(n_rows * head_dim)
        self.state = torch.empty(n_rows * 2)


def n_parts_for(n_pairs: int, n_slots: int, n_threads: int) -> int:
    """In how many parts the slots of each pair of query and key head are attended to, so that all threads have work."""
    if n_threads == 1:
        return 1
    return max(1, min(-(-4 * n_threads // n_pairs), -(-n_slots // SEGMENT)))


def attention_jobs(
    queries: Queries,
    k: torch.Tensor,
    v: torch.Tensor,
    ring: Ring,
    scratch: Scratch,
    n_parts: int,
    out: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[Job]:
    """One after the other, they write what `queries` get to the address `out`, (n_tokens, n_heads, head_dim).

    k, v, scales: as `mistralcli.ops.attention` takes them, of any strides between sequences and heads.
    """
    n_kv_heads, head_dim = k.shape[1], k.shape[3]
    group, n_tokens = queries.n_heads // n_kv_heads, queries.n_tokens
    window = ring.sliding_window or 0
    slots = (k.stride(0) // head_dim, k.stride(1) // head_dim)
    sums, state = scratch.sums.data_ptr(), scratch.state.data_ptr()
    attend = (
        *(queries.address, queries.token_bytes, queries.places),
        *(k.data_ptr(), v.data_ptr()),
        *((0, 0) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr())),
        *(*slots, head_dim * k.itemsize, ring.capacity, window),
        *(n_kv_heads, group, n_parts, sums, state, scratch.most_segments),
    )
    of_query = (queries.places, queries.n_heads, ring.capacity, window)
    combine = (sums, state, scratch.most_segments, out, group, *of_query)
    return [
        Job(kernel(_attending_kernel, NUMBERS[k.dtype], head_dim), n_tokens * n_kv_heads * n_parts, attend),
        Job(kernel(_combining_kernel, head_dim), n_tokens * queries.n_heads, combine),
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
    where, out = places(seen), torch.empty_like(rows)
    n_threads = torch.get_num_threads() if k.nbytes > WORTH_A_THREAD else 1
    n_parts = n_parts_for(n_seqs * n_tokens * k.shape[1], seen.n_slots, n_threads)
    scratch = Scratch(n_seqs * n_tokens, n_heads, head_dim, seen.n_slots)
    queries = Queries(rows.data_ptr(), 4 * n_heads * head_dim, where.data_ptr(), n_seqs * n_tokens, n_heads)
    scales = None if key_scales is None or value_scales is None else (key_scales, value_scales)
    for job in attention_jobs(queries, k, v, seen.ring, scratch, n_parts, out.data_ptr(), scales):
        pool.run(job, n_threads)
    return out.transpose(1, 2).to(q.dtype)


def takes(k: torch.Tensor, v: torch.Tensor, *scales: torch.Tensor | None) -> bool:
    """Whether it knows the type, and vectors of head_dim lie slot by slot, with scales beside them, as in a cache."""
    head_dim = k.shape[3]
    same = k.stride() == v.stride() and k.stride(3) == 1 and k.stride(2) == head_dim
    beside = tuple(stride // head_dim for stride in k.stride()[:3])
    return same and is_known(k.dtype) and all(one is None or one.stride() == beside for one in scales)
