"""Dequantizing matmuls as plain PyTorch: `y = x wᵀ` with `w = (q − zero) · scale`.

Weights stay in the bytes they are stored in and are dequantized a tile of output rows at a time, so that a
call needs little memory beyond them and a memory-mapped weight is never copied.

How exact they are: a code minus its zero point has at most 9 significant bits, so `w` is exact in float32
for float16 and bfloat16 scales and rounded once for float32 ones. Products are accumulated in float32, and the
sum is rounded to x's dtype. With u = 2⁻²⁴ and v the unit roundoff of x's dtype (0 for float32),

    |y − exact| ≤ (in_features + 1) · u · Σ |x_i w_i| + v · |exact|      (to first order in u and v)
"""

import torch
from torch.nn.functional import pad

from quant.kernels.cpu.layout import Interleaved, restored
from quant.registry import op

TILE_WEIGHTS = 1 << 21
"""Weights dequantized at once, 8 MB of float32. On one core of an AVX-512 EPYC a weight of 4096×14336 in int4
takes 0.24 ns for one row of x and 10.7 ns for 512; with tiles an eighth as large 0.32 and 21.6, and twice as
large 0.43 and 9.8."""


@op(cuda="quant.kernels.matmul:int4_matmul")
def int4_matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """`y = x wᵀ`, `w[o, i] = (q[o, i] − zeros[o, g]) · scales[o, g]` with g the group of column i.

    x: (..., in_features), any float dtype. qweight: (out_features, at least in_features / 2) uint8; byte k
    has column 2k in its low nibble and column 2k + 1 in its high one, each as q + 8. scales: (out_features,
    n_groups) float. zeros: the same shape, int8, or None where they are all 0. Returns (..., out_features) in
    x's dtype.
    """
    # Splitting x by the parity of its columns once is cheaper than interleaving the nibbles of every weight.
    even, odd = (x.float().reshape(-1, x.shape[-1])[:, parity::2] for parity in (0, 1))
    split = torch.cat((even, pad(odd, (0, x.shape[-1] % 2))), dim=1)
    return (
        _matmul_in_tiles(split, qweight, scales, zeros, bits=4).to(x.dtype).view(*x.shape[:-1], len(qweight))
    )


@op(cuda="quant.kernels.matmul:int8_matmul")
def int8_matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """`y = x wᵀ`, `w[o, i] = (q[o, i] − zeros[o, g]) · scales[o, g]` with g the group of column i.

    As `int4_matmul`, but qweight is (out_features, at least in_features) uint8, each byte a code as q + 128.
    """
    rows = x.float().reshape(-1, x.shape[-1])
    return (
        _matmul_in_tiles(rows, qweight, scales, zeros, bits=8).to(x.dtype).view(*x.shape[:-1], len(qweight))
    )


@op(cpu="quant.kernels.cpu.matmul:interleaved_matmul")
def interleaved_matmul(x: torch.Tensor, weight: Interleaved) -> torch.Tensor:
    """`int4_matmul` or `int8_matmul` of a weight whose words lie as the CPU's kernels read them.

    x: (..., in_features), any float dtype. Returns (..., out_features) in x's dtype. The kernel rounds x, to 8 bits
    where the weight has 4 and to 16 where it has 8.
    """
    matmul = int4_matmul if weight.bits == 4 else int8_matmul
    return matmul.reference(x, *restored(weight))


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, in_features: int, bits: int
) -> torch.Tensor:
    """`w` itself, (out_features, in_features) float32; the other arguments are those of the matmuls."""
    parts = 8 // bits
    n_columns = in_features + in_features % parts
    tile = scales.new_empty(qweight.shape[0] * n_columns, dtype=torch.float32)
    w = _dequantize(qweight, scales, zeros, tile, n_columns, bits)
    return w.view(-1, parts, n_columns // parts).mT.flatten(1)[:, :in_features]


def _matmul_in_tiles(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """x: (n_tokens, n_columns) float32, columns in the order of `_dequantize`; to (n_tokens, out_features)."""
    out_features, n_columns = qweight.shape[0], x.shape[1]
    y = x.new_empty(x.shape[0], out_features)
    tile_rows = max(1, TILE_WEIGHTS // n_columns)
    tile = x.new_empty(min(tile_rows, out_features) * n_columns)
    for start in range(0, out_features, tile_rows):
        rows = slice(start, start + tile_rows)
        tile_zeros = None if zeros is None else zeros[rows]
        y[:, rows] = x @ _dequantize(qweight[rows], scales[rows], tile_zeros, tile, n_columns, bits).T
    return y


def _dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    tile: torch.Tensor,
    n_columns: int,
    bits: int,
) -> torch.Tensor:
    """Rows of w, (rows, n_columns), in the memory of `tile`; for 4 bits first the even columns, then the odd."""
    codes = _codes(qweight, n_columns, bits)  # (rows, parts, n_columns / parts)
    rows, parts, _ = codes.shape
    w = tile[: rows * n_columns].view(rows, parts, scales.shape[1], -1)
    w.copy_(codes.view(w.shape))
    if zeros is not None:
        w.sub_(zeros.float()[:, None, :, None])
    w.mul_(scales.float()[:, None, :, None])
    return w.view(rows, n_columns)


def _codes(qweight: torch.Tensor, n_columns: int, bits: int) -> torch.Tensor:
    """Signed int8 codes (rows, parts, n_columns / parts): one part for 8 bits, a part for each parity for 4."""
    if bits == 8:
        return (qweight[:, None, :n_columns] ^ 128).view(torch.int8)
    packed = qweight[:, : n_columns // 2]
    return (torch.stack((packed & 15, packed >> 4), dim=1) - 8).view(torch.int8)
