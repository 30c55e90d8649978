"""Matmuls for 4 to 16 rows on tensor cores, from weights as they are stored, without shared memory or barriers.

With a few rows the arithmetic of `quant.kernels.matvec` costs more time than reading the weights; a tensor core takes 8
rows at once. Here the weight is its left operand: 16 outputs at a time, and 8 or 16 rows are padded to, not 64.

Of 8 rows and 16 columns, a tensor core wants in lane 4i + j of a warp those of row i at columns 2j, 2j + 1, 2j + 8 and
2j + 9. But columns may come in any order, the same in both operands. So a lane reads 16 bytes of row i, a quad of the
weight (`quant.kernels.activations`), and calls what it unpacks of them those columns; likewise of the activations,
whose planes are arranged to meet them. Nothing has to change lanes: the layouts that Triton chooses for the loads, for
the shapes below, are those that it wants for the products (tests/test_matvec_kernels.py holds it to that).

The warps of a program share its outputs and divide the columns among them, so that even a matrix of 4,096 rows
keeps enough bytes on their way; their sums meet once, at the end.
"""

import triton
import triton.language as tl

from quant.kernels.epilogue import before_sum, finish, gated, norm_of, root_mean_square, squares_of
from quant.kernels.ptx import add_bfloat16, multiply_bfloat16, unpack_int4, unpack_int8

TILE_WORDS = 16
"""Words of a row that a warp reads at once: four lanes, a quad each."""


@triton.jit(do_not_specialize_on_alignment=["x_scales", "scales", "zeros"])
def tile_kernel(
    x,
    x_scales,
    sums,
    weight,
    scales,
    zeros,
    y,
    norm_weight,
    next_x,
    next_scales,
    next_sums,
    counters,
    n_rows,
    out_features,
    n_words,
    n_groups,
    quads_per_group,
    n_sums,
    eps,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    NEXT_ROUNDING: tl.constexpr,
    N_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    N_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    WARPS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y[m, o] = Σ_i x[m, i] w[o, i]` for BLOCK_OUT outputs o a program, then the epilogue.

    x: planes of bfloat16; x_scales is not read. weight: (out_features, 2 · n_words) int16, for SwiGLU as in
    `matvec_kernel`. GROUPS: "wide" where a group has whole tiles, whose sums it scales; "narrow" where not: then it
    scales the weights, which rounds them to bfloat16; "channel" where a row has one scale, at the end. N_TILES: of each
    warp; DEPTH of them are on their way while one is multiplied. EVEN: neither ends within what is read at once.

    Tiles are (8 outputs or rows, warps, how many times 8, int16 of the weight or elements of a plane).
    """
    GATED: tl.constexpr = EPILOGUE == "swiglu_and_pack"
    EIGHTS: tl.constexpr = BLOCK_OUT // 4 if GATED else BLOCK_OUT // 8
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, 8)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    eight = tl.arange(0, EIGHTS)[None, None, :, None]
    out = tl.program_id(0) * BLOCK_OUT + i
    stored_row = out + (eight // 2 * 8 + eight % 2 * out_features if GATED else eight * 8)
    under_way = ()  # type: tuple[object, ...]
    for t in tl.static_range(DEPTH):
        more = tl.full([1, 1, 1, 1], t, tl.int32) < N_TILES
        tile = _weight_tile(weight, scales, zeros, stored_row, warp + t * WARPS, more, n_words, n_groups,
                            quads_per_group, ASYMMETRIC, GROUPS, EVEN)  # fmt: skip
        under_way = under_way + (tile,)  # noqa: RUF005  Triton does not unpack
    norm = norm_of(norm_weight, EPILOGUE, BLOCK_OUT)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if N_SUMS:  # on their way during the loop, as is what y already holds
        squares = squares_of(sums, tl.arange(0, ROWS), n_rows, n_sums, N_SUMS)
    before = before_sum(y, n_rows, out_features, EPILOGUE, ROWS, BLOCK_OUT)
    x_row = tl.minimum(i + tl.arange(0, ROWS // 8)[None, None, :, None] * 8, n_rows - 1)
    acc = tl.zeros([WARPS, EIGHTS * 8, ROWS], tl.float32)
    for first in tl.range(0, N_TILES, DEPTH, num_stages=1):
        for d in tl.static_range(DEPTH):
            at = first + d
            more = tl.full([1, 1, 1, 1], at + DEPTH, tl.int32) < N_TILES
            tile = _weight_tile(weight, scales, zeros, stored_row, warp + (at + DEPTH) * WARPS, more, n_words, n_groups,
                                quads_per_group, ASYMMETRIC, GROUPS, EVEN)  # fmt: skip
            acc = _add_product(acc, under_way[0], x, x_row, warp + at * WARPS, n_words,
                               BITS, ASYMMETRIC, GROUPS, EVEN, PTX)  # fmt: skip
            under_way = under_way[1:] + (tile,)  # noqa: RUF005
    if GROUPS == "channel":
        acc *= _by_output(tl.load(scales + stored_row + tl.zeros([1, WARPS, 1, 4], tl.int32)), ROWS)
    total = tl.sum(acc, axis=0)  # (EIGHTS * 8, ROWS)
    if N_SUMS:
        total /= root_mean_square(squares, n_sums, eps)[None, :]
    if GATED:
        pairs = tl.permute(tl.reshape(total, [EIGHTS // 2, 2, 8, ROWS]), [0, 2, 3, 1])
        gate, up = tl.split(tl.reshape(pairs, [BLOCK_OUT, ROWS, 2]))
        total = gated(gate, up)
    finish(total, before, y, norm, next_x, next_scales, next_sums, counters, n_rows, out_features,
           EPILOGUE, NEXT_BITS, NEXT_ROUNDING, ROWS, BLOCK_OUT)  # fmt: skip


@triton.jit
def _weight_tile(
    weight,
    scales,
    zeros,
    stored_row,
    at,
    more,
    n_words,
    n_groups,
    quads_per_group,
    ASYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The tiles `at`, if there are `more`: (8, WARPS, EIGHTS, 32) int16, and their quads' scales and zeros (…, 4).

    What is beyond the end of a row is anything for codes, and 0 for the rest.
    """
    row = stored_row.to(tl.int64)
    element = at * 32 + tl.arange(0, 32)[None, None, None, :]
    quad = at * 4 + tl.arange(0, 4)[None, None, None, :]
    in_row = more if EVEN else element < 2 * n_words
    in_quads = more if EVEN else quad < n_words // 4
    q = tl.load(weight + row * (2 * n_words) + element, mask=in_row, eviction_policy="evict_first")
    group = tl.max_contiguous(quad // quads_per_group, [1, 1, 1, 2])  # no more than an order of the axes
    group = row * n_groups + group
    scale, zero = q, q  # where there are none
    if GROUPS != "channel":
        scale = tl.load(scales + group, mask=in_quads, other=0.0)
    if ASYMMETRIC:
        zero = tl.load(zeros + group, mask=in_quads, other=0)
    return q, scale, zero


@triton.jit
def _add_product(
    acc,
    tile,
    x,
    x_row,
    at,
    n_words,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """`acc` (WARPS, EIGHTS * 8, ROWS) and the product of one tile for each warp."""
    PLANES: tl.constexpr = 16 // BITS
    q, scale, zero = tile
    element = at * 32 + tl.arange(0, 32)[None, None, None, :]
    x_at = x + x_row * (PLANES * 2 * n_words) + element
    part = tl.zeros(acc.shape, tl.float32) if GROUPS == "wide" else acc
    for plane in tl.static_range(PLANES):
        if EVEN:
            columns = tl.load(x_at + plane * 2 * n_words)
        else:
            columns = tl.load(x_at + plane * 2 * n_words, mask=element < 2 * n_words, other=0.0)
        w = _operand(unpack_int4(q, plane, PTX) if BITS == 4 else unpack_int8(q, plane, PTX))
        if ASYMMETRIC:
            w = add_bfloat16(w, _by_quad(-zero.to(tl.float32), w.dtype), PTX)
        if GROUPS == "narrow":
            w = multiply_bfloat16(w, _by_quad(scale, w.dtype), PTX)
        part = tl.dot(w, tl.trans(_operand(columns), 0, 2, 1).to(w.dtype), part, input_precision="ieee")
    if GROUPS == "wide":
        part = acc + part * _by_output(scale, acc.shape[2])
    return part


@triton.jit
def _operand(tile):
    """(8, WARPS, EIGHTS, 32) as a product takes it, (WARPS, EIGHTS * 8, 32): see above."""
    lanes = tl.reshape(tile, [8, tile.shape[1], tile.shape[2], 4, 4, 2])  # …, lane, tile of 8 columns, pair
    return tl.reshape(tl.permute(lanes, [1, 2, 0, 4, 3, 5]), [tile.shape[1], tile.shape[2] * 8, 32])


@triton.jit
def _by_quad(values, dtype: tl.constexpr):
    """One value for each quad, (8, WARPS, EIGHTS, 4), for each element of the operand."""
    lanes = tl.permute(values.to(dtype), [1, 2, 0, 3])[:, :, :, None, :, None]
    lanes = tl.broadcast_to(lanes, [values.shape[1], values.shape[2], 8, 4, 4, 2])
    return tl.reshape(lanes, [values.shape[1], values.shape[2] * 8, 32])


@triton.jit
def _by_output(values, ROWS: tl.constexpr):
    """One value for each output, four times in (8, WARPS, EIGHTS, 4), for each sum (WARPS, EIGHTS * 8, ROWS)."""
    lanes = tl.permute(values.to(tl.float32), [1, 2, 0, 3])[:, :, :, None, :, None]
    lanes = tl.broadcast_to(lanes, [values.shape[1], values.shape[2], 8, ROWS // 8, 4, 2])
    return tl.reshape(lanes, [values.shape[1], values.shape[2] * 8, ROWS])
