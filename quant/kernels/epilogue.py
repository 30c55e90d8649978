"""How a matmul for few rows ends: its sum is finished, stored, and packed for the next one.

The kernels of `quant.kernels.matvec` and `quant.kernels.tiles` share it. A program comes with all sums of some outputs,
(BLOCK_OUT, ROWS) float32, where BLOCK_OUT divides 32.
"""

import triton
import triton.language as tl

from quant.kernels.activations import pack


@triton.jit
def squares_of(sums, row, n_rows, n_sums, N_SUMS: tl.constexpr):
    """The sums of squares by blocks of 32 columns of some rows, (ROWS, N_SUMS)."""
    block = tl.arange(0, N_SUMS)
    mask = (row < n_rows)[:, None] & (block < n_sums)[None, :]
    return tl.load(sums + row[:, None] * n_sums + block[None, :], mask=mask, other=0.0)


@triton.jit
def root_mean_square(squares, n_sums, eps):
    """The divisor of each row's RMSNorm from `squares_of`: (ROWS,)."""
    return tl.sqrt(tl.sum(squares, axis=1) / (n_sums * 32) + eps)


@triton.jit
def gated(gate, up):
    """SwiGLU."""
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _is_last(counter, n_programs):
    """Whether this program is the last of n_programs to come here; then what they all wrote can be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == n_programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def before_sum(y, n_rows, out_features, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """What the product is added to, (BLOCK_OUT, ROWS) float32."""
    if EPILOGUE == "add" or EPILOGUE == "add_and_pack":
        at, mask = _outputs(y, n_rows, out_features, ROWS, BLOCK_OUT)
        before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        before = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    return before


@triton.jit
def norm_of(norm_weight, EPILOGUE: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """The weights, (1, 32) float32, of the norm behind the sum, for the columns that this program's outputs are among.

    They are read ahead of the sum, for they are in no cache.
    """
    if EPILOGUE == "add_and_pack":
        block = tl.program_id(0) * BLOCK_OUT // 32
        norm = tl.load(norm_weight + block * 32 + tl.arange(0, 32)[None, :]).to(tl.float32)
    else:
        norm = tl.full([1, 32], 1.0, tl.float32)
    return norm


@triton.jit
def _outputs(y, n_rows, out_features, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Where this program's outputs are stored, (BLOCK_OUT, ROWS), and which of them there are."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, ROWS)
    mask = (out < out_features)[:, None] & (row < n_rows)[None, :]
    return y + row[None, :] * out_features + out[:, None], mask


@triton.jit
def finish(
    total,
    before,
    y,
    norm,
    next_x,
    next_scales,
    next_sums,
    counters,
    n_rows,
    out_features,
    EPILOGUE: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    NEXT_ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Add `before` (`before_sum`), store and pack behind `norm` (`norm_of`); a SwiGLU is computed already.

    32 columns are packed by the program that has them, or by the last of those that share them.
    """
    PACKS: tl.constexpr = EPILOGUE == "add_and_pack" or EPILOGUE == "swiglu_and_pack"
    NORM: tl.constexpr = EPILOGUE == "add_and_pack"
    total += before
    if EPILOGUE != "swiglu_and_pack" or BLOCK_OUT < 32:
        at, mask = _outputs(y, n_rows, out_features, ROWS, BLOCK_OUT)
        tl.store(at, total.to(y.dtype.element_ty), mask=mask)
    if PACKS:
        block = tl.program_id(0) * BLOCK_OUT // 32
        if BLOCK_OUT == 32:
            _pack_block(tl.trans(total), block, norm, next_x, next_scales, next_sums, n_rows, out_features,
                        NORM, NEXT_BITS, NEXT_ROUNDING, ROWS)  # fmt: skip
        else:
            if _is_last(counters + block, 32 // BLOCK_OUT):
                values = _read_block(block, y, n_rows, out_features, ROWS)
                _pack_block(values, block, norm, next_x, next_scales, next_sums, n_rows, out_features,
                            NORM, NEXT_BITS, NEXT_ROUNDING, ROWS)  # fmt: skip


@triton.jit
def _read_block(block, y, n_rows, out_features, ROWS: tl.constexpr):
    """32 columns of y, (ROWS, 32), which other programs wrote, hence past the first-level cache."""
    row = tl.arange(0, ROWS)[:, None]
    at = y + row * out_features + block * 32 + tl.arange(0, 32)[None, :]
    return tl.load(at, mask=row < n_rows, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _pack_block(
    values,
    block,
    norm,
    next_x,
    next_scales,
    next_sums,
    n_rows,
    out_features,
    NORM: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    NEXT_ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pack 32 columns, (ROWS, 32), for the next product."""
    row = tl.arange(0, ROWS)
    mask = row < n_rows
    if NORM:
        squares = tl.sum(values * values, axis=1)
        tl.store(next_sums + row * (out_features // 32) + block, squares, mask=mask)
        values *= norm
    pack(values, row, mask, block * 32 + tl.zeros([ROWS], tl.int32), next_x, next_scales, out_features,
         NEXT_BITS, NEXT_ROUNDING, ROWS, 32)  # fmt: skip
