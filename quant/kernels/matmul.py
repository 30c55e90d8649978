"""The int4 and int8 matmuls on CUDA: by `matvec` for few rows, else dequantized into a tile for cuBLAS."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quant import ops
from quant.kernels.activations import Rounding, packed
from quant.kernels.matvec import MOST_ROWS, Weight, matvec

TILE_BYTES = 128 << 20
"""The most that is dequantized at once: a gate or a head of a 7B model whole."""

ROUNDINGS: dict[int, Rounding] = {4: "int8", 8: "half", 16: "plain"}
"""How activations are rounded for few rows, by the bits of the weight (16: dense): to int8 only where that adds
less than a tenth of the error that the weights' own rounding has."""


def int4_matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """Stands in for `quant.ops.int4_matmul`, whose contract it keeps."""
    return _matmul(x, qweight, scales, zeros, 4)


def int8_matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """Stands in for `quant.ops.int8_matmul`, whose contract it keeps."""
    return _matmul(x, qweight, scales, zeros, 8)


def _matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    weight = Weight.quantized(qweight, scales, zeros, bits)
    if not weight.supported or weight.in_features != x.shape[-1]:
        reference = ops.int4_matmul if bits == 4 else ops.int8_matmul
        return reference.reference(x, qweight, scales, zeros)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(*x.shape[:-1], weight.out_features)
    if len(rows) > MOST_ROWS:
        _matmul_in_tiles(rows, weight, y.view(len(rows), -1))
    elif len(rows):
        matvec(packed(rows, bits, ROUNDINGS[bits]), weight, y.view(len(rows), -1))
    return y


def _matmul_in_tiles(x: torch.Tensor, weight: Weight, y: torch.Tensor) -> None:
    """Dequantize as many rows of the weight as the tile holds, multiply, and go on."""
    n_rows = min(weight.out_features, max(1, TILE_BYTES // (weight.in_features * x.element_size())))
    tile = x.new_empty(n_rows, weight.in_features)
    for start in range(0, weight.out_features, n_rows):
        part = tile[: min(n_rows, weight.out_features - start)]
        dequantize(weight, start, part)
        if n_rows == weight.out_features:
            torch.matmul(x, part.T, out=y)
        else:
            y[:, start : start + len(part)] = F.linear(x, part)


def dequantize(weight: Weight, start: int, out: torch.Tensor) -> None:
    """Write the rows from `start` on of the dequantized weight to `out` (n_rows, in_features), rounded to its type."""
    n_words = weight.words.shape[1]
    rows, words = 4, min(256, triton.next_power_of_2(n_words))
    _dequantize_kernel[(triton.cdiv(len(out), rows), triton.cdiv(n_words, words))](
        weight.words[start:] if start else weight.words,
        weight.scales[start:] if start else weight.scales,
        weight.scales if weight.zeros is None else weight.zeros[start:],
        out,
        len(out),
        n_words,
        weight.scales.shape[1],
        n_words // weight.scales.shape[1],
        BITS=weight.bits,
        ASYMMETRIC=weight.zeros is not None,
        ROWS=rows,
        WORDS=words,
        num_warps=4,
    )


@triton.jit
def _dequantize_kernel(
    qweight,
    scales,
    zeros,
    out,
    n_rows,
    n_words,
    n_groups,
    words_per_group,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    word = (tl.program_id(1) * WORDS + tl.arange(0, WORDS))[None, :]
    mask = (row < n_rows) & (word < n_words)
    q = tl.load(qweight + row * n_words + word, mask=mask, other=0)
    at = row * n_groups + word // words_per_group
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.full([ROWS, WORDS], 1 << (BITS - 1), tl.int32)
    if ASYMMETRIC:
        zero += tl.load(zeros + at, mask=mask, other=0).to(tl.int32)
    shift = tl.arange(0, PER_WORD)[None, None, :] * BITS
    codes = (q[:, :, None] >> shift) & ((1 << BITS) - 1)
    w = (codes - zero[:, :, None]).to(tl.float32) * scale[:, :, None]
    w = tl.reshape(w, [ROWS, WORDS * PER_WORD]).to(out.dtype.element_ty)
    column = (tl.program_id(1) * WORDS * PER_WORD + tl.arange(0, WORDS * PER_WORD))[None, :]
    tl.store(
        out + row * (n_words * PER_WORD) + column, w, mask=(row < n_rows) & (column < n_words * PER_WORD)
    )
