"""The beginning of a decode step in Triton: positions, their rotary angles, and the embedding behind the first norm."""

import torch
import triton
import triton.language as tl

from quant.kernels.activations import BLOCK, Activations, pack


def embed(
    token_ids: torch.Tensor,
    last: torch.Tensor,
    embedding: torch.Tensor,
    frequencies: torch.Tensor,
    norm_weight: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    h: torch.Tensor,
    x: Activations,
) -> None:
    """Start a step of n_seqs sequences, each of which had its last token at position `last` (n_seqs,).

    token_ids, positions: (n_seqs,) int64; embedding: (vocab_size, dim); frequencies: (head_dim / 2,) float64. Fills
    positions, cos and sin (n_seqs, head_dim / 2), the residual stream h (n_seqs, dim) float32, and x with
    `h · norm_weight` before its division by the root mean square. An id of −1 is taken for 0: the sampler has said
    that it is none.
    """
    n_seqs, dim = h.shape
    n_angles = frequencies.shape[0]
    _embed_kernel[(n_seqs, dim // BLOCK)](
        token_ids,
        last,
        embedding,
        frequencies,
        norm_weight,
        positions,
        cos,
        sin,
        h,
        x.elements,
        x.scales,
        x.square_sums,
        dim,
        n_angles,
        ANGLES=triton.next_power_of_2(n_angles),
        BITS=x.bits,
        ROUNDING=x.rounding,
        BLOCK=BLOCK,
        num_warps=1,
    )


@triton.jit
def _embed_kernel(
    token_ids,
    last,
    embedding,
    frequencies,
    norm_weight,
    positions,
    cos,
    sin,
    h,
    x,
    x_scales,
    square_sums,
    dim,
    n_angles,
    ANGLES: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    block = tl.program_id(1)
    if block == 0:
        position = tl.load(last + sequence) + 1
        tl.store(positions + sequence, position)
        i = tl.arange(0, ANGLES)
        in_head = i < n_angles
        angles = position.to(tl.float64) * tl.load(frequencies + i, mask=in_head, other=0.0)
        at = sequence * n_angles + i
        tl.store(cos + at, tl.cos(angles).to(tl.float32), mask=in_head)
        tl.store(sin + at, tl.sin(angles).to(tl.float32), mask=in_head)
    column = block * BLOCK + tl.arange(0, BLOCK)
    token_id = tl.maximum(tl.load(token_ids + sequence), 0)
    values = tl.load(embedding + token_id * dim + column).to(tl.float32)
    tl.store(h + sequence * dim + column, values)
    tl.store(square_sums + sequence * (dim // BLOCK) + block, tl.sum(values * values, axis=0))
    values *= tl.load(norm_weight + column).to(tl.float32)
    row = sequence + tl.zeros([1], tl.int32)
    first = block * BLOCK + tl.zeros([1], tl.int32)
    pack(values[None, :], row, row >= 0, first, x, x_scales, dim, BITS, ROUNDING, 1, BLOCK)
