"""Attention of many queries over the ring in Triton: keys in blocks, an online softmax, no mask in memory.

The blocks run over positions, from the first that a tile's first query sees to the last query's own, and find them
in the ring: what lies outside the window is never loaded. The query heads that share a key head go into one tile,
as neighbouring rows of it, so that a tile spans few positions and its blocks need masks at the two edges only
(Dao 2023, "FlashAttention-2", has the algorithm without window and ring).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mistralcli.cache import Seen


@dataclass(frozen=True)
class Tile:
    """`rows` queries against blocks of `keys` keys, by `warps` warps, the loads `stages` blocks deep."""

    rows: int
    keys: int
    warps: int
    stages: int


HOPPER_TILE, WIDE_HOPPER_TILE = Tile(128, 64, 8, 3), Tile(64, 32, 8, 3)
"""For compute capability 9.0, and where head_dim is above 128: without spills, 128 KiB of shared memory at most."""

TILE, WIDE_TILE = Tile(128, 32, 8, 3), Tile(32, 32, 4, 2)
"""For the other tensor cores, whose queries stay in registers: 64 keys would spill; 64 KiB fit all cards from 8.0."""

SCALAR_TILE = Tile(32, 32, 8, 1)
"""Without tensor cores: on older cards, and for float32, which they would round to 10 bits."""

INTERPRETED_TILE = Tile(16, 16, 4, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Seen,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See `mistralcli.ops.attention`. Products take operands of the cache's dtype and add up in float32.

    Where the cache is int8 they take bfloat16, or float32 where q is: it has every code, and room for the least
    weight times the least scale, and what it rounds of q and of the weights is a fraction of what int8 did.
    """
    n_seqs, n_heads, n_tokens, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1 and k.stride() == v.stride()
    assert (k.dtype == torch.int8) == (key_scales is not None) == (value_scales is not None)
    tile = tile or _tile_for(q, k, n_tokens * group)
    if key_scales is not None and value_scales is not None:
        assert key_scales.stride(2) == 1 and key_scales.stride() == value_scales.stride()
        k, v = k.view(torch.int32), v.view(torch.int32)  # the kernel's words of four codes
    # In memory (n_seqs, n_tokens, n_heads, head_dim), as the next matmul reads it.
    out = q.new_empty(n_seqs, n_tokens, n_heads, head_dim).transpose(1, 2)
    grid = (triton.cdiv(n_tokens * group, tile.rows), n_kv_heads, n_seqs)
    if out.numel() == 0:
        return out
    _flash_kernel[grid](
        q,
        k,
        v,
        key_scales,
        value_scales,
        seen.positions,
        out,
        *q.stride()[:3],
        *k.stride()[:3],
        *(key_scales.stride()[:2] if key_scales is not None else (0, 0)),
        *seen.positions.stride(),
        *out.stride()[:3],
        n_tokens,
        seen.ring.capacity,
        head_dim**-0.5 * 1.4426950408889634,  # log2(e), since the kernel's exponentials are to base 2
        GROUP=group,
        WINDOW=seen.ring.sliding_window or 0,
        HEAD_DIM=head_dim,
        ROWS=tile.rows,
        KEYS=tile.keys,
        COLUMNS=max(16, triton.next_power_of_2(head_dim)),
        STAGES=tile.stages,
        INTERPRETED=k.device.type == "cpu",
        num_warps=tile.warps,
    )
    return out


def _tile_for(q: torch.Tensor, k: torch.Tensor, n_rows: int) -> Tile:
    """The tile for `n_rows` queries of each key head; one token's take one of few rows, lest most of it be idle."""
    if k.device.type == "cpu":
        return INTERPRETED_TILE
    capability = torch.cuda.get_device_capability(k.device)
    quantized = k.dtype == torch.int8
    if (q if quantized else k).dtype == torch.float32 or capability < (8, 0):
        return SCALAR_TILE
    narrow, wide = (HOPPER_TILE, WIDE_HOPPER_TILE) if capability == (9, 0) else (TILE, WIDE_TILE)
    tile = narrow if q.shape[3] <= 128 else wide
    if n_rows > 16:
        return tile
    n_keys = 32 if quantized else tile.keys  # 64 would spill where they are unpacked
    return Tile(16, n_keys, 4, tile.stages)


@triton.jit(do_not_specialize=["n_tokens", "positions_seq"])
def _flash_kernel(
    q,
    k,
    v,
    key_scales,
    value_scales,
    positions,
    out,
    q_seq,
    q_head,
    q_token,
    k_seq,
    k_head,
    k_slot,
    scales_seq,
    scales_head,
    positions_seq,
    positions_token,
    out_seq,
    out_head,
    out_token,
    n_tokens,
    capacity,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # The last queries see the most keys, so their tiles start first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    positions += sequence * positions_seq
    query = tl.load(positions + tokens * positions_token, mask=tokens < n_tokens, other=-1).to(tl.int32)
    first = tl.load(positions + first_row // GROUP * positions_token).to(tl.int32)
    last = tl.max(query, axis=0)  # −1 where the whole tile is padding: no blocks then

    columns = tl.arange(0, COLUMNS)
    in_tile = (query >= 0)[:, None] & (columns < HEAD_DIM)[None, :]
    at = sequence * q_seq + heads * q_head + tokens * q_token
    queries = tl.load(q + at[:, None] + columns[None, :], mask=in_tile, other=0.0)
    if key_scales is None:
        queries = queries.to(k.dtype.element_ty)
    elif q.dtype.element_ty != tl.float32:
        queries = queries.to(tl.bfloat16)
    k += sequence * k_seq + kv_head * k_head
    v += sequence * k_seq + kv_head * k_head
    if key_scales is not None:
        key_scales += sequence * scales_seq + kv_head * scales_head
        value_scales += sequence * scales_seq + kv_head * scales_head

    low = tl.maximum(first - WINDOW + 1, 0) if WINDOW else 0
    n_blocks = tl.cdiv(last + 1 - low, KEYS)
    # Blocks that every query sees whole: from the first above the last query's window to the first query itself.
    whole = tl.cdiv(tl.maximum(last - WINDOW + 1 - low, 0), KEYS) if WINDOW else 0
    whole = tl.minimum(whole, n_blocks)
    whole_end = tl.maximum((first + 1 - low) // KEYS, whole)
    largest = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a row that sees nothing yet makes no NaN
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest, total, sums = _attend(
        queries, query, k, v, key_scales, value_scales, k_slot, low, 0, whole, last, capacity, scale,
        largest, total, sums, True, WINDOW, HEAD_DIM, KEYS, COLUMNS, STAGES, INTERPRETED,
    )  # fmt: skip
    largest, total, sums = _attend(
        queries, query, k, v, key_scales, value_scales, k_slot, low, whole, whole_end, last, capacity, scale,
        largest, total, sums, False, WINDOW, HEAD_DIM, KEYS, COLUMNS, STAGES, INTERPRETED,
    )  # fmt: skip
    largest, total, sums = _attend(
        queries, query, k, v, key_scales, value_scales, k_slot, low, whole_end, n_blocks, last, capacity, scale,
        largest, total, sums, True, WINDOW, HEAD_DIM, KEYS, COLUMNS, STAGES, INTERPRETED,
    )  # fmt: skip
    sums = tl.where((query >= 0)[:, None], sums / tl.where(query >= 0, total, 1.0)[:, None], 0.0)
    at = sequence * out_seq + heads * out_head + tokens * out_token
    in_out = (tokens < n_tokens)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out + at[:, None] + columns[None, :], sums.to(out.dtype.element_ty), mask=in_out)


@triton.jit
def _attend(
    queries,
    query,
    k,
    v,
    key_scales,
    value_scales,
    k_slot,
    low,
    begin,
    end,
    last,
    capacity,
    scale,
    largest,
    total,
    sums,
    EDGE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the blocks begin … end of the positions from `low` on to an online softmax; only at an EDGE with masks.

    largest, total: (ROWS,), the largest score so far and the sum of the exponentials below it; sums:
    (ROWS, COLUMNS), the sum of the values with these weights.
    """
    MASKED: tl.constexpr = EDGE or HEAD_DIM != COLUMNS
    PACK: tl.constexpr = 1 if key_scales is None else 4
    columns = tl.arange(0, COLUMNS // PACK)[None, :]
    for block in tl.range(begin, end, num_stages=STAGES):
        held = low + block * KEYS + tl.arange(0, KEYS)
        slots = ring_slots(low + block * KEYS, capacity, KEYS)
        at = slots[:, None] * k_slot + columns
        in_block = columns < HEAD_DIM // PACK
        if EDGE:
            in_block = in_block & (held <= last)[:, None]
        keys = tl.load(k + at, mask=in_block, other=0) if MASKED else tl.load(k + at)
        if key_scales is not None:
            keys = unpacked(keys, queries.dtype)
        scores = dot(queries, keys.T, tl.zeros([queries.shape[0], KEYS], tl.float32), INTERPRETED)
        if key_scales is not None:
            scores *= _load_scales(key_scales + slots, held, last, EDGE)[None, :]
        if EDGE:
            seen = held[None, :] <= query[:, None]
            if WINDOW:
                seen = seen & (held[None, :] > query[:, None] - WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None]
        values = tl.load(v + at, mask=in_block, other=0) if MASKED else tl.load(v + at)
        if value_scales is not None:
            values = unpacked(values, queries.dtype)
            weights *= _load_scales(value_scales + slots, held, last, EDGE)[None, :]
        sums = dot(weights.to(queries.dtype), values, sums, INTERPRETED)
        largest = new_largest
    return largest, total, sums


@triton.jit
def _load_scales(at, held, last, EDGE: tl.constexpr):
    """The scales of a block's keys or values, (KEYS,)."""
    return tl.load(at, mask=held <= last, other=0.0) if EDGE else tl.load(at)


@triton.jit
def unpacked(words, DTYPE: tl.constexpr):
    """The int8 codes of words of four, (ROWS, WORDS) int32, as floats: (ROWS, 4 · WORDS).

    A byte with its sign flipped is code + 128; as the last bits of 2²³ it is a float without a conversion, of which a
    multiprocessor makes few at a time. Loaded as bytes, values would come from shared memory one by one, each into a
    register of its own.
    """
    flipped = words ^ -2139062144  # 0x80808080
    even = tl.join(_as_float(flipped & 0xFF), _as_float((flipped >> 16) & 0xFF))
    odd = tl.join(_as_float((flipped >> 8) & 0xFF), _as_float((flipped >> 24) & 0xFF))
    return tl.join(even, odd).reshape([words.shape[0], 4 * words.shape[1]]).to(DTYPE)


@triton.jit
def _as_float(byte):
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0  # 2²³ + 128


@triton.jit
def dot(a, b, sums, INTERPRETED: tl.constexpr):
    """`a b + sums` in float32. Triton's interpreter would multiply bfloat16 as integers, so there it is widened."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def ring_slots(first_position, capacity, N: tl.constexpr):
    """The slots of the positions from `first_position` on, (N,): one modulo, then at most one wrap.

    Positions more than `capacity` behind the first get a slot outside the ring: they are never seen together.
    """
    slots = first_position % capacity + tl.arange(0, N)
    return tl.where(slots >= capacity, slots - capacity, slots)
