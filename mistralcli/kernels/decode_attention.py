"""One token's attention in one launch, in Triton: rotary, the new key and value into the ring, attention, combination.

A decode step has few queries and many keys, so the positions that a sequence sees are split over several programs
for each key head, and the last of them to finish combines what all have found (Dao et al. 2023, "Flash-Decoding",
with its second launch saved by a counter). A key is loaded once for all query heads that share it.

In a short context a launch is nothing but latency, so little stands between what it waits for and what it leaves: the
tensor cores take the keys as their rows and the few queries as columns, and the first keys and values are where these
read them before the queries are there.
"""

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from mistralcli.cache import Ring
from mistralcli.kernels.flash_attention import dot, ring_slots, unpacked
from mistralcli.kernels.pointwise import int8_codes, int8_scales
from quant.kernels.activations import Activations, pack

MAX_SPLITS = 32


@dataclass(frozen=True)
class Blocks:
    """Positions go by in blocks of `keys`, by `warps` warps, the loads `stages` blocks deep."""

    keys: int
    warps: int
    stages: int


HOPPER_BLOCKS, BLOCKS = Blocks(128, 8, 3), Blocks(64, 4, 2)
"""Of head_dim 128 in 16 bits: for compute capability 9.0, and for the 99 KiB of shared memory of consumer cards."""

INTERPRETED_BLOCKS = Blocks(16, 4, 1)


@dataclass(frozen=True)
class Scratch:
    """What the programs of a launch leave for the one that combines; one serves all layers, one after the other.

    sums: (n_seqs · n_kv_heads, n_splits, group, head_dim) float32; statistics: (n_seqs · n_kv_heads, n_splits, 2,
    group) float32, the largest score and the sum of exponentials; arrived: (n_seqs · n_kv_heads,) int32, zero between
    launches.
    """

    sums: torch.Tensor
    statistics: torch.Tensor
    arrived: torch.Tensor

    @staticmethod
    def empty(
        n_seqs: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        n_splits: int | None = None,
    ) -> "Scratch":
        """Room for `n_splits` programs for each key head; without it, as many as `splits_for` says."""
        n_pairs = n_seqs * n_kv_heads
        n_splits = n_splits or splits_for(n_pairs, device)
        assert n_splits & (n_splits - 1) == 0, f"{n_splits} splits: tl.arange takes powers of two"
        group = n_heads // n_kv_heads
        return Scratch(
            torch.empty(n_pairs, n_splits, group, head_dim, device=device),
            torch.empty(n_pairs, n_splits, 2, group, device=device),
            torch.zeros(n_pairs, dtype=torch.int32, device=device),
        )

    @property
    def n_splits(self) -> int:
        return self.sums.shape[1]


def splits_for(n_pairs: int, device: torch.device | str) -> int:
    """The power of two nearest to one program for each multiprocessor: 16 on an H200 for 8 pairs, its best."""
    if torch.device(device).type == "cpu":
        return 4
    n_sms: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(MAX_SPLITS, 1 << max(0, round(math.log2(n_sms / n_pairs))))


def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scratch: Scratch,
    out: Activations,
    ring: Ring,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    pdl: bool = False,
    blocks: Blocks | None = None,
) -> None:
    """Rotate q and k of n_seqs new tokens, write k and v into the ring, and attend to what the window shows.

    It is `apply_rotary`, `LayerCache.write` and `attention` (`mistralcli.ops`) for one token of each sequence.

    qkv: (n_seqs, (n_heads + 2 n_kv_heads) · head_dim) float32, q, k and v before rotary; cos, sin:
    (n_seqs, head_dim / 2) float32 of the sequences' positions; keys, values: (n_seqs, n_kv_heads, capacity, head_dim),
    the whole ring of a layer, which holds the positions before; positions: (n_seqs,) int64; out: n_seqs rows of
    n_heads · head_dim, rounded only where head_dim is a power of two and no less than 32; key_scales, value_scales:
    (n_seqs, n_kv_heads, capacity) where keys and values are int8, whose products are made in bfloat16. All are
    contiguous. With `pdl` the launch may overlap the one before it.
    """
    n_seqs, n_kv_heads, capacity, head_dim = keys.shape
    group = qkv.shape[1] // (n_kv_heads * head_dim) - 2
    assert capacity == ring.capacity, f"{capacity} slots of a ring of {ring.capacity}"
    assert (keys.dtype == torch.int8) == (key_scales is not None) == (value_scales is not None)
    assert scratch.sums.shape == (n_seqs * n_kv_heads, scratch.n_splits, group, head_dim)
    blocks = blocks or _blocks_for(keys)
    columns = max(32, triton.next_power_of_2(head_dim))
    grid = (n_seqs * n_kv_heads, scratch.n_splits)
    _decode_kernel[grid](
        qkv,
        cos,
        sin,
        keys,
        values,
        key_scales,
        value_scales,
        positions,
        scratch.sums,
        scratch.statistics,
        scratch.arrived,
        out.elements,
        out.scales,
        n_kv_heads,
        capacity,
        head_dim**-0.5 * 1.4426950408889634,  # log2(e), since the kernel's exponentials are to base 2
        GROUP=group,
        WINDOW=ring.sliding_window or 0,
        HEAD_DIM=head_dim,
        N_SPLITS=scratch.n_splits,
        BITS=out.bits,
        ROUNDING=out.rounding,
        ROWS=max(8, triton.next_power_of_2(group)),
        COLUMNS=columns,
        KEYS=blocks.keys,
        HEADS=triton.next_power_of_2(group),
        STAGES=blocks.stages,
        INTERPRETED=keys.device.type == "cpu",
        PDL=pdl,
        num_warps=blocks.warps,
        **({"launch_pdl": True} if pdl else {}),
    )


def _blocks_for(keys: torch.Tensor) -> Blocks:
    """Blocks of as many bytes, whatever head_dim and dtype; of 8 bits half, for they are widened in registers."""
    if keys.device.type == "cpu":
        return INTERPRETED_BLOCKS
    blocks = HOPPER_BLOCKS if torch.cuda.get_device_capability(keys.device) == (9, 0) else BLOCKS
    smaller = (1 if keys.itemsize == 2 else 2) * (1 if keys.shape[3] <= 128 else 2)
    return replace(blocks, keys=blocks.keys // smaller)


@triton.jit
def _decode_kernel(
    qkv,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
    positions,
    sums_out,
    statistics,
    arrived,
    out,
    out_scales,
    n_kv_heads,
    capacity,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    N_SPLITS: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    split = tl.program_id(1)
    sequence = pair // n_kv_heads
    kv_head = pair % n_kv_heads
    position = tl.load(positions + sequence).to(tl.int32)
    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW else 0
    # Few positions take few programs: one alone has nothing to combine.
    n_active = tl.minimum(tl.maximum(tl.cdiv(position - low, KEYS), 1), N_SPLITS)
    if split >= n_active:
        return
    share = tl.cdiv(position - low, n_active)
    begin = low + split * share
    end = tl.minimum(begin + share, position)
    keys += pair.to(tl.int64) * capacity * HEAD_DIM
    values += pair.to(tl.int64) * capacity * HEAD_DIM
    if key_scales is not None:
        key_scales += pair.to(tl.int64) * capacity
        value_scales += pair.to(tl.int64) * capacity
    # Earlier positions were written in earlier steps, which are over: they are read while the product before this
    # launch, which makes q, k and v, is still going on.
    block = _load_block(keys, values, key_scales, value_scales, begin, end, capacity, HEAD_DIM, COLUMNS, KEYS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    qkv += sequence * (GROUP + 2) * n_kv_heads * HEAD_DIM
    cos += sequence * (HEAD_DIM // 2)
    sin += sequence * (HEAD_DIM // 2)
    rows = tl.arange(0, ROWS)
    query = _rotated(qkv, kv_head * GROUP + rows, rows < GROUP, cos, sin, HEAD_DIM, COLUMNS)
    query = query.to(keys.dtype.element_ty if key_scales is None else tl.bfloat16)
    largest = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a split without positions makes no NaN
    totals = tl.zeros([KEYS, ROWS], tl.float32)
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    if split == 0:  # begins with the new token, from registers, and writes it into the ring
        key_head, slot = n_kv_heads * GROUP + kv_head, position % capacity
        key, key_scale = _new_key(qkv, cos, sin, keys, key_scales, key_head, slot, HEAD_DIM, COLUMNS, ROWS)
        value = _new_value(qkv, values, value_scales, key_head + n_kv_heads, slot, HEAD_DIM, COLUMNS)
        largest = tl.sum(query.to(tl.float32) * key, axis=1) * (key_scale * scale)
        totals += tl.where(tl.arange(0, KEYS) == 0, 1.0, 0.0)[:, None]
        sums += value[:, None]
    query = query.T
    largest, totals, sums = _attend(query, block, begin, end, scale, largest, totals, sums, KEYS, INTERPRETED)
    if begin + KEYS < end:  # the loop's loads ahead of time would take their time without it, too
        for at in tl.range(begin + KEYS, end, KEYS, num_stages=STAGES):
            block = _load_block(
                keys, values, key_scales, value_scales, at, end, capacity, HEAD_DIM, COLUMNS, KEYS
            )
            largest, totals, sums = _attend(
                query, block, at, end, scale, largest, totals, sums, KEYS, INTERPRETED
            )
    total = tl.sum(totals, axis=0)

    columns = tl.arange(0, COLUMNS)
    if n_active == 1:
        attended = tl.trans(sums * (1 / total)[None, :])
        _store(
            attended, sequence, n_kv_heads, kv_head, rows, out, out_scales,
            GROUP, HEAD_DIM, BITS, ROUNDING, ROWS, COLUMNS,
        )  # fmt: skip
        return
    sums_out += pair * N_SPLITS * GROUP * HEAD_DIM
    statistics += pair * N_SPLITS * 2 * GROUP
    at = (split * GROUP + rows)[None, :] * HEAD_DIM + columns[:, None]
    tl.store(sums_out + at, sums, mask=(rows < GROUP)[None, :] & (columns < HEAD_DIM)[:, None])
    tl.store(statistics + split * 2 * GROUP + rows, largest, mask=rows < GROUP)
    tl.store(statistics + (split * 2 + 1) * GROUP + rows, total, mask=rows < GROUP)
    # All threads' stores come before the one that counts; who counts last sees every split's.
    tl.debug_barrier()
    if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == n_active - 1:
        tl.store(arrived + pair, 0)
        _combine(
            sums_out, statistics, n_active, out, out_scales, sequence, n_kv_heads, kv_head,
            GROUP, HEAD_DIM, BITS, ROUNDING, HEADS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _rotated(qkv, heads, in_heads, cos, sin, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Some heads after rotary, (n, COLUMNS) float32; see `mistralcli.ops.apply_rotary`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = heads[:, None] * 0 + tl.arange(0, COLUMNS)[None, :]  # all loads of one shape, so of one layout
    mask = in_heads[:, None]
    if HEAD_DIM != COLUMNS:
        mask = mask & (columns < HEAD_DIM)
    at = qkv + heads[:, None] * HEAD_DIM
    own = tl.load(at + columns, mask=mask, other=0.0)
    partner = tl.load(at + (columns + HALF) % HEAD_DIM, mask=mask, other=0.0)
    c = tl.load(cos + columns % HALF)
    s = tl.load(sin + columns % HALF)
    return own * c + partner * tl.where(columns < HALF, -s, s)


@triton.jit
def _new_key(
    qkv,
    cos,
    sin,
    keys,
    key_scales,
    head,
    slot,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the new key; return it as the ring holds it, (ROWS, COLUMNS) float32, and its scales, (ROWS,).

    All rows are the same, as many as the queries', so that both lie alike in registers.
    """
    rows = tl.arange(0, ROWS)
    key = _rotated(qkv, head + rows * 0, rows >= 0, cos, sin, HEAD_DIM, COLUMNS)
    key_scale = tl.full([ROWS], 1.0, tl.float32)
    if key_scales is not None:
        key_scale = int8_scales(key)
        key = int8_codes(key, key_scale)
        tl.store(key_scales + slot + rows * 0, key_scale, mask=rows == 0)
    key = key.to(keys.dtype.element_ty)
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = rows[:, None] == 0
    if HEAD_DIM != COLUMNS:
        mask = mask & (columns < HEAD_DIM)
    tl.store(keys + slot * HEAD_DIM + rows[:, None] * 0 + columns, key, mask=mask)
    return key.to(tl.float32), key_scale


@triton.jit
def _new_value(qkv, values, value_scales, head, slot, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the new value; return it as the ring stands for it, (COLUMNS,) float32."""
    columns = tl.arange(0, COLUMNS)
    in_head = columns < HEAD_DIM
    value = tl.load(qkv + head * HEAD_DIM + columns, mask=in_head, other=0.0)
    value_scale = 1.0
    if value_scales is not None:
        value_scale = tl.sum(int8_scales(value[None, :]), axis=0)
        tl.store(value_scales + slot, value_scale)
        value = int8_codes(value[None, :], value_scale + tl.zeros([1], tl.float32)).reshape([COLUMNS])
    value = value.to(values.dtype.element_ty)
    tl.store(values + slot * HEAD_DIM + columns, value, mask=in_head)
    return value.to(tl.float32) * value_scale


@triton.jit
def _load_block(
    keys,
    values,
    key_scales,
    value_scales,
    begin,
    end,
    capacity,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Keys and values of the positions begin … min(end, begin + KEYS), (KEYS, COLUMNS), zeros behind them.

    Where they are int8, they are words of four, and their scales follow.
    """
    in_block = begin + tl.arange(0, KEYS) < end
    PACK: tl.constexpr = 1 if key_scales is None else 4
    if key_scales is not None:
        keys, values = keys.to(tl.pointer_type(tl.int32)), values.to(tl.pointer_type(tl.int32))
    slot = ring_slots(begin, capacity, KEYS)
    columns = tl.arange(0, COLUMNS // PACK)[None, :]
    at = slot[:, None] * (HEAD_DIM // PACK) + columns
    mask = in_block[:, None]
    if HEAD_DIM != COLUMNS:
        mask = mask & (columns < HEAD_DIM // PACK)
    block = tl.load(keys + at, mask=mask, other=0), tl.load(values + at, mask=mask, other=0)
    if key_scales is not None:
        key_scale = tl.load(key_scales + slot, mask=in_block, other=0.0)
        value_scale = tl.load(value_scales + slot, mask=in_block, other=0.0)
        block = block[0], block[1], key_scale, value_scale  # type: ignore[assignment]
    return block


@triton.jit
def _attend(
    query,
    block,
    begin,
    end,
    scale,
    largest,
    totals,
    sums,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add a loaded block of positions to an online softmax.

    query: (COLUMNS, ROWS); largest: (ROWS,), the largest score so far; totals: (KEYS, ROWS), the exponentials below
    it, whose sum is left for the end; sums: (COLUMNS, ROWS), the sum of the values with these weights.
    """
    key, value = block[0], block[1]
    if len(block) == 4:
        key, value = unpacked(key, query.dtype), unpacked(value, query.dtype)
    scores = dot(key, query, tl.zeros([KEYS, query.shape[1]], tl.float32), INTERPRETED)
    if len(block) == 4:
        scores *= block[2][:, None]
    in_block = begin + tl.arange(0, KEYS) < end
    scores = tl.where(in_block[:, None], scores * scale, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=0))
    weights = tl.exp2(scores - new_largest[None, :])
    shrink = tl.exp2(largest - new_largest)[None, :]
    totals = totals * shrink + weights
    if len(block) == 4:
        weights *= block[3][:, None]
    sums = dot(value.T, weights.to(query.dtype), sums * shrink, INTERPRETED)
    return new_largest, totals, sums


@triton.jit
def _combine(
    sums,
    statistics,
    n_active,
    out,
    out_scales,
    sequence,
    n_kv_heads,
    kv_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The softmax over all splits of the group's heads. What others wrote is read past this SM's own cache.

    One split comes after the other, with all threads side by side along the columns, so that nothing goes from thread
    to thread; eight of them are on their way at once.
    """
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, COLUMNS)[None, :]
    in_group = heads < GROUP
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    combined = tl.zeros([HEADS, COLUMNS], tl.float32)
    for first in tl.range(0, n_active, 8, num_stages=1):
        for i in tl.static_range(8):
            split = first + i
            mask = in_group & (heads * 0 + split < n_active)
            at = statistics + split * 2 * GROUP + heads
            split_largest = tl.load(at, mask=mask, other=-1e30, cache_modifier=".cg")
            split_total = tl.load(at + GROUP, mask=mask, other=0.0, cache_modifier=".cg")
            in_head = mask[:, None] & (columns < HEAD_DIM)
            at = sums + (split * GROUP + heads)[:, None] * HEAD_DIM + columns
            part = tl.load(at, mask=in_head, other=0.0, cache_modifier=".cg")
            new_largest = tl.maximum(largest, split_largest)
            shrink, weight = tl.exp2(largest - new_largest), tl.exp2(split_largest - new_largest)
            total = total * shrink + split_total * weight
            combined = combined * shrink[:, None] + part * weight[:, None]
            largest = new_largest
    combined *= (1 / tl.where(in_group, total, 1.0))[:, None]
    _store(
        combined, sequence, n_kv_heads, kv_head, heads, out, out_scales,
        GROUP, HEAD_DIM, BITS, ROUNDING, HEADS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _store(
    attended,
    sequence,
    n_kv_heads,
    kv_head,
    heads,
    out,
    out_scales,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Leave some heads of the group, (HEADS, COLUMNS) float32, as the next product reads them."""
    width = n_kv_heads * GROUP * HEAD_DIM
    first_column = (kv_head * GROUP + heads) * HEAD_DIM
    if ROUNDING == "plain":
        columns = tl.arange(0, COLUMNS)
        at = out + sequence * width + first_column[:, None] + columns[None, :]
        tl.store(at, attended, mask=(heads < GROUP)[:, None] & (columns < HEAD_DIM)[None, :])
    else:
        tl.static_assert(COLUMNS == HEAD_DIM)
        rows = sequence + tl.zeros([HEADS], tl.int32)
        pack(
            attended,
            rows,
            heads < GROUP,
            first_column,
            out,
            out_scales,
            width,
            BITS,
            ROUNDING,
            HEADS,
            COLUMNS,
        )
