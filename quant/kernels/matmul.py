"""The int4 and int8 matmuls on CUDA: by `matvec` for few rows, else dequantized into a tile for cuBLAS."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quant import ops
from quant.kernels.activations import Rounding, has_tensor_cores, packed
from quant.kernels.matvec import MOST_ROWS, Weight, matvec
from quant.kernels.ptx import dequantize_int4

TILE_BYTES = 128 << 20
"""The most that is dequantized at once: a gate or a head of a 7B model whole."""

WORDS = 1024
"""Of the weight, that a program dequantizes."""

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
    assert weight.words.is_contiguous() and weight.scales.is_contiguous() and out.is_contiguous()
    n_words = weight.words.shape[1]
    in_pairs = weight.bits == 4 and weight.scales.dtype == out.dtype == torch.bfloat16
    is_cuda = out.device.type == "cuda"
    _dequantize_kernel[(triton.cdiv(len(out) * n_words, WORDS),)](
        weight.words[start:] if start else weight.words,
        weight.scales[start:] if start else weight.scales,
        weight.scales if weight.zeros is None else weight.zeros[start:],
        out.view(torch.int32) if in_pairs else out,
        len(out) * n_words,
        WORDS_PER_GROUP=n_words // weight.scales.shape[1],
        BITS=weight.bits,
        ASYMMETRIC=weight.zeros is not None,
        WORDS=WORDS,
        IN_PAIRS=in_pairs,
        PTX=is_cuda and torch.version.hip is None and has_tensor_cores(out.device),
        num_warps=4,
    )


@triton.jit
def _dequantize_kernel(
    qweight,
    scales,
    zeros,
    out,
    n_words,
    WORDS_PER_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WORDS: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    PTX: tl.constexpr,
):
    """All rows as one: a group is WORDS_PER_GROUP of the `n_words` in all, and rows are whole groups.

    IN_PAIRS: out holds words of two bfloat16, as the scales are, and there is no arithmetic in float32.
    """
    first = tl.program_id(0).to(tl.int64) * WORDS
    word = first + tl.arange(0, WORDS)
    mask = word < n_words
    # A thread takes single words, so that it writes what lies beside what its neighbours write.
    q = tl.load(qweight + tl.max_contiguous(word, [1]), mask=mask, other=0)
    group = word.to(tl.int32) // WORDS_PER_GROUP
    scale = tl.load(scales + group, mask=mask, other=0.0)
    zero = tl.full([WORDS], 1 << (BITS - 1), tl.float32)
    if ASYMMETRIC:
        zero += tl.load(zeros + group, mask=mask, other=0).to(tl.float32)
    PARTS: tl.constexpr = 4 if IN_PAIRS else 32 // BITS
    if IN_PAIRS:
        pair0, pair1, pair2, pair3 = dequantize_int4(q, scale, zero, PTX)
        w = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
    else:
        codes = (q[:, None] >> (tl.arange(0, PARTS)[None, :] * BITS)) & ((1 << BITS) - 1)
        w = ((codes.to(tl.float32) - zero[:, None]) * scale.to(tl.float32)[:, None]).to(out.dtype.element_ty)
    at = first * PARTS + tl.arange(0, WORDS * PARTS)
    tl.store(out + at, tl.reshape(w, [WORDS * PARTS]), mask=at < n_words.to(tl.int64) * PARTS)
