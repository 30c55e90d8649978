"""One token's attention in one launch, in Triton: rotary, the new key and value into the ring, attention, combination.

A decode step has few queries and many keys, so the positions that a sequence sees are split over several programs
for each key head, and the last of them to finish combines what all have found (Dao et al. 2023, "Flash-Decoding",
with its second launch saved by a counter). A key is loaded once for all query heads that share it.
"""

import math
from dataclasses import dataclass

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
        ROWS=max(16, triton.next_power_of_2(group)),
        HALF=columns // 2,
        KEYS=blocks.keys,
        HEADS=_heads_at_once(group, scratch.n_splits, columns),
        STAGES=blocks.stages,
        INTERPRETED=keys.device.type == "cpu",
        PDL=pdl,
        num_warps=blocks.warps,
        **({"launch_pdl": True} if pdl else {}),
    )


def _blocks_for(keys: torch.Tensor) -> Blocks:
    """64 keys of head_dim 128 in 16 bits, else as many bytes; of 8 bits no more, for they are widened in registers.

    The first block is held in registers while the launch waits for q, k and v: 128 keys, or 2 warps, would spill.
    Two blocks on their way take 66 KiB of shared memory.
    """
    if keys.device.type == "cpu":
        return INTERPRETED_BLOCKS
    n_keys = 64 if keys.shape[3] <= 128 else 32
    return Blocks(n_keys // max(keys.itemsize // 2, 1), 4, 3)


def _heads_at_once(group: int, n_splits: int, columns: int) -> int:
    """How many heads the combination takes together: 64 registers for each of 128 threads."""
    heads: int = triton.next_power_of_2(group)
    return max(1, min(heads, 8192 // (n_splits * columns)))


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
    HALF: tl.constexpr,
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
    block = _load_block(keys, values, key_scales, value_scales, begin, end, capacity, HEAD_DIM, HALF, KEYS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    qkv += sequence * (GROUP + 2) * n_kv_heads * HEAD_DIM
    cos += sequence * (HEAD_DIM // 2)
    sin += sequence * (HEAD_DIM // 2)
    rows = tl.arange(0, ROWS)
    first, second = _rotated(qkv, kv_head * GROUP + rows, rows < GROUP, cos, sin, HEAD_DIM, HALF)
    if key_scales is None:
        first, second = first.to(keys.dtype.element_ty), second.to(keys.dtype.element_ty)
    else:
        first, second = first.to(tl.bfloat16), second.to(tl.bfloat16)

    largest = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a split without positions makes no NaN
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, 2 * HALF], tl.float32)
    if split == 0:
        largest, total, sums = _new_token(
            qkv, cos, sin, keys, values, key_scales, value_scales, first, second, kv_head, n_kv_heads,
            position % capacity, scale, GROUP, HEAD_DIM, ROWS, HALF,
        )  # fmt: skip
    largest, total, sums = _attend(
        first, second, block, begin, end, scale, largest, total, sums, KEYS, INTERPRETED
    )
    for at in tl.range(begin + KEYS, end, KEYS, num_stages=STAGES):
        block = _load_block(keys, values, key_scales, value_scales, at, end, capacity, HEAD_DIM, HALF, KEYS)
        largest, total, sums = _attend(
            first, second, block, at, end, scale, largest, total, sums, KEYS, INTERPRETED
        )

    columns = tl.arange(0, 2 * HALF)
    if n_active == 1:
        _store(
            sums / total[:, None], sequence, n_kv_heads, kv_head, rows, out, out_scales,
            GROUP, HEAD_DIM, BITS, ROUNDING, ROWS, 2 * HALF,
        )  # fmt: skip
        return
    sums_out += pair * N_SPLITS * GROUP * HEAD_DIM
    statistics += pair * N_SPLITS * 2 * GROUP
    at = (split * GROUP + rows)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(sums_out + at, sums, mask=(rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :])
    tl.store(statistics + split * 2 * GROUP + rows, largest, mask=rows < GROUP)
    tl.store(statistics + (split * 2 + 1) * GROUP + rows, total, mask=rows < GROUP)
    # All threads' stores come before the one that counts; who counts last sees every split's.
    tl.debug_barrier()
    if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == n_active - 1:
        tl.store(arrived + pair, 0)
        for head in tl.static_range(0, GROUP, HEADS):
            _combine(
                sums_out, statistics, n_active, out, out_scales, sequence, n_kv_heads, kv_head, head,
                GROUP, HEAD_DIM, N_SPLITS, BITS, ROUNDING, HEADS, 2 * HALF,
            )  # fmt: skip


@triton.jit
def _rotated(qkv, heads, in_rows, cos, sin, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Both halves of some heads after rotary, each (ROWS, HALF) float32; see `mistralcli.ops.apply_rotary`."""
    i = tl.arange(0, HALF)
    in_half = i < HEAD_DIM // 2
    mask = in_rows[:, None] & in_half[None, :]
    at = qkv + heads[:, None] * HEAD_DIM + i[None, :]
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + HEAD_DIM // 2, mask=mask, other=0.0)
    c = tl.load(cos + i, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + i, mask=in_half, other=0.0)[None, :]
    return first * c - second * s, second * c + first * s


@triton.jit
def _new_token(
    qkv,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
    first,
    second,
    kv_head,
    n_kv_heads,
    slot,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Write the new key and value, and begin the softmax with them, from registers: (largest, total, sums)."""
    head = n_kv_heads * GROUP + kv_head + tl.zeros([1], tl.int32)
    key_first, key_second = _rotated(qkv, head, head >= 0, cos, sin, HEAD_DIM, HALF)
    columns = tl.arange(0, 2 * HALF)
    in_head = columns < HEAD_DIM
    value = tl.load(qkv + (head + n_kv_heads) * HEAD_DIM + columns, mask=in_head, other=0.0)
    key_scale = 1.0
    value_scale = 1.0
    if key_scales is not None:
        key_scale = int8_scales(tl.join(key_first, key_second).reshape([1, 2 * HALF]))
        key_first, key_second = int8_codes(key_first, key_scale), int8_codes(key_second, key_scale)
        value_scale = int8_scales(value[None, :])
        value = int8_codes(value[None, :], value_scale).reshape([2 * HALF])
        here = slot + tl.zeros([1], tl.int32)
        tl.store(key_scales + here, key_scale)
        tl.store(value_scales + here, value_scale)
    key_first, key_second = key_first.to(keys.dtype.element_ty), key_second.to(keys.dtype.element_ty)
    i = tl.arange(0, HALF)[None, :]
    at = keys + slot * HEAD_DIM + i
    tl.store(at, key_first, mask=i < HEAD_DIM // 2)
    tl.store(at + HEAD_DIM // 2, key_second, mask=i < HEAD_DIM // 2)
    value = value.to(values.dtype.element_ty)
    tl.store(values + slot * HEAD_DIM + columns, value, mask=in_head)
    scores = tl.sum(first.to(tl.float32) * key_first.to(tl.float32), axis=1)
    scores += tl.sum(second.to(tl.float32) * key_second.to(tl.float32), axis=1)
    if key_scales is not None:
        scores *= key_scale
    sums = (value.to(tl.float32) * value_scale)[None, :] + tl.zeros([ROWS, 2 * HALF], tl.float32)
    return scores * scale, tl.full([ROWS], 1.0, tl.float32), sums


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
    HALF: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Both halves of the keys and the values of the positions begin … min(end, begin + KEYS), zeros behind them.

    Where they are int8, they are words of four, and their scales follow.
    """
    in_block = begin + tl.arange(0, KEYS) < end
    PACK: tl.constexpr = 1 if key_scales is None else 4
    if key_scales is not None:
        keys, values = keys.to(tl.pointer_type(tl.int32)), values.to(tl.pointer_type(tl.int32))
    slot = ring_slots(begin, capacity, KEYS)
    slots = slot[:, None] * (HEAD_DIM // PACK)
    i = tl.arange(0, HALF // PACK)[None, :]
    mask = in_block[:, None] & (i < HEAD_DIM // 2 // PACK)
    key_first = tl.load(keys + slots + i, mask=mask, other=0)
    key_second = tl.load(keys + slots + HEAD_DIM // 2 // PACK + i, mask=mask, other=0)
    columns = tl.arange(0, 2 * HALF // PACK)[None, :]
    value = tl.load(values + slots + columns, mask=in_block[:, None] & (columns < HEAD_DIM // PACK), other=0)
    block = key_first, key_second, value
    if key_scales is not None:
        key_scale = tl.load(key_scales + slot, mask=in_block, other=0.0)
        value_scale = tl.load(value_scales + slot, mask=in_block, other=0.0)
        block = key_first, key_second, value, key_scale, value_scale  # type: ignore[assignment]
    return block


@triton.jit
def _attend(
    first,
    second,
    block,
    begin,
    end,
    scale,
    largest,
    total,
    sums,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add a loaded block of positions to an online softmax, as `flash_attention._attend` does."""
    QUANTIZED: tl.constexpr = len(block) == 5
    key_first, key_second, value = block[0], block[1], block[2]
    if QUANTIZED:
        key_first, key_second = unpacked(key_first, first.dtype), unpacked(key_second, first.dtype)
        value = unpacked(value, first.dtype)
    scores = dot(first, key_first.T, tl.zeros([first.shape[0], KEYS], tl.float32), INTERPRETED)
    scores = dot(second, key_second.T, scores, INTERPRETED)
    if QUANTIZED:
        scores *= block[3][None, :]
    in_block = begin + tl.arange(0, KEYS) < end
    scores = tl.where(in_block[None, :], scores * scale, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, axis=1)
    if QUANTIZED:
        weights *= block[4][None, :]
    sums = dot(weights.to(first.dtype), value, sums * shrink[:, None], INTERPRETED)
    return new_largest, total, sums


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
    first_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    N_SPLITS: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The softmax over all splits for HEADS heads of the group. What others wrote is read past this SM's own cache."""
    splits = tl.arange(0, N_SPLITS)
    heads = first_head + tl.arange(0, HEADS)
    columns = tl.arange(0, COLUMNS)
    at = statistics + splits[:, None] * (2 * GROUP) + heads[None, :]
    in_splits = splits < n_active
    mask = in_splits[:, None] & (heads < GROUP)[None, :]
    largest = tl.load(at, mask=mask, other=-1e30, cache_modifier=".cg")  # (N_SPLITS, HEADS)
    total = tl.load(at + GROUP, mask=mask, other=1.0, cache_modifier=".cg")
    weights = tl.exp2(largest - tl.max(largest, axis=0)[None, :])
    weights = weights / tl.sum(weights * total, axis=0)[None, :]
    mask = (heads < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    place = heads[:, None] * HEAD_DIM + columns[None, :]
    at = sums + splits[:, None, None] * (GROUP * HEAD_DIM) + place[None, :, :]
    mask = in_splits[:, None, None] & mask[None, :, :]
    parts = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    combined = tl.sum(parts * weights[:, :, None], axis=0)
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
