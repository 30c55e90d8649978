"""Pre-fill's RMSNorm, rotary embedding, SwiGLU and writes to the cache in Triton: a launch for three to eight."""

import torch
import triton
import triton.language as tl

from mistralcli.cache import Seen

BLOCK = 1024


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Stands in for `mistralcli.ops.rms_norm`, whose contract it keeps."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, weight.dtype))
    if len(rows):
        width = triton.next_power_of_2(rows.shape[1])
        warps = min(max(width // 512, 1), 16)
        _rms_norm_kernel[(len(rows),)](rows, weight, out, rows.shape[1], eps, WIDTH=width, num_warps=warps)
    return out.view(x.shape)


@triton.jit
def _rms_norm_kernel(x, weight, out, dim, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    column = tl.arange(0, WIDTH)
    mask = column < dim
    wide = tl.load(x + row + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    product = normed * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + column, product.to(out.dtype.element_ty), mask=mask)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Stands in for `mistralcli.ops.apply_rotary`, whose contract it keeps."""
    n_seqs, n_tokens, n_heads, head_dim = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        heads, half = triton.next_power_of_2(n_heads), triton.next_power_of_2(head_dim // 2)
        _rotary_kernel[(n_seqs * n_tokens,)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            n_heads,
            head_dim // 2,
            HEADS=heads,
            HALF=half,
            num_warps=4,
        )
    return out


@triton.jit
def _rotary_kernel(x, cos, sin, out, n_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)[:, None]
    mask = (head < n_heads) & (i < half)[None, :]
    c = tl.load(cos + token * half + i, mask=i < half, other=0.0)[None, :]
    s = tl.load(sin + token * half + i, mask=i < half, other=0.0)[None, :]
    at = (token * n_heads + head) * (2 * half) + i[None, :]
    first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + half, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Stands in for `mistralcli.ops.swiglu`, whose contract it keeps."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        _swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=4
        )
    return out


@triton.jit
def _swiglu_kernel(gate, up, out, n_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_elements
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    product = silu * tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=mask)


def write_ring(
    buffer: torch.Tensor, x: torch.Tensor, seen: Seen, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Stands in for `mistralcli.cache.write_ring`, whose contract it keeps."""
    n_seqs, n_tokens, n_heads, head_dim = x.shape
    if x.stride()[2:] != (head_dim, 1):
        x = x.contiguous()
    _write_kernel[(n_seqs, n_tokens)](
        buffer,
        scales,
        x,
        seen.positions,
        seen.ring.capacity,
        n_heads,
        head_dim,
        buffer.stride(0),
        buffer.stride(1),
        *(scales.stride()[:2] if scales is not None else (0, 0)),
        x.stride(0),
        x.stride(1),
        seen.positions.stride(0),
        HEADS=triton.next_power_of_2(n_heads),
        COLUMNS=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return buffer


@triton.jit
def _write_kernel(
    buffer,
    scales,
    x,
    positions,
    capacity,
    n_heads,
    head_dim,
    buffer_seq,
    buffer_head,
    scales_seq,
    scales_head,
    x_seq,
    x_token,
    positions_seq,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + sequence * positions_seq + token)
    if position < 0:
        return
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (head < n_heads) & (column < head_dim)
    value = tl.load(x + sequence * x_seq + token * x_token + head * head_dim + column, mask=mask, other=0.0)
    if scales is not None:
        heads = tl.arange(0, HEADS)
        scale = int8_scales(value.to(tl.float32))
        at = scales + sequence * scales_seq + heads.to(tl.int64) * scales_head + position % capacity
        tl.store(at, scale, mask=heads < n_heads)
        value = int8_codes(value.to(tl.float32), scale)
    at = (
        buffer
        + sequence * buffer_seq
        + head.to(tl.int64) * buffer_head
        + position % capacity * head_dim
        + column
    )
    tl.store(at, value.to(buffer.dtype.element_ty), mask=mask)


@triton.jit
def int8_scales(x):
    """The scales of `mistralcli.cache.quantized` for x (ROWS, COLUMNS) float32, (ROWS,).

    A maximum passes over NaN, so a sum says whether all values are finite.
    """
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
    return tl.div_rn(largest, 127.0 + tl.zeros_like(largest)) + tl.sum(x * 0.0, axis=1)


@triton.jit
def int8_codes(x, scales):
    """Its codes, (ROWS, COLUMNS) float32. From 2²³ to 2²⁴ there are no fractions: a sum rounds half to even there."""
    SHIFT: tl.constexpr = 12582912.0  # 1.5 · 2²³
    return tl.div_rn(x, scales[:, None] + tl.zeros_like(x)) + SHIFT - SHIFT
