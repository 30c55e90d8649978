"""Rows of an int4 or int8 weight as dense ones, for cuBLAS to multiply."""

import torch
import triton
import triton.language as tl

from quant.kernels.activations import has_tensor_cores
from quant.kernels.matvec import Weight
from quant.kernels.ptx import dequantize_int4

WORDS = 1024
"""Of the weight, that a program dequantizes."""


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
    # The last rows first: of what was written last, the L2 cache still has a part when cuBLAS begins with the first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * WORDS
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
