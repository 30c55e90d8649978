"""Attention on the CPU: of a few queries by a kernel of ours, of many by PyTorch's fused scaled_dot_product_attention.

Neither holds all scores at once. PyTorch's multiplies tiles of queries; ours reads the ring as it lies there and shares
each key among the heads of a group.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from mistralcli.cache import Seen

FEW_QUERIES = 8
"""Of a sequence, up to which each walks along the keys by itself."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Seen,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mistralcli.ops.attention`."""
    kernel = _of_few() if q.shape[2] <= FEW_QUERIES else None
    if kernel is not None and kernel.takes(k, v, key_scales, value_scales):
        attended: torch.Tensor = kernel.attention(q, k, v, seen, key_scales, value_scales)
        return attended
    if k.dtype == q.dtype:
        return _attended(q, k, v, seen)
    # A cache of another type is unpacked one key head at a time, lest it be in memory twice.
    out = [
        _attended(of_head, _unpacked(k, key_scales, i, q.dtype), _unpacked(v, value_scales, i, q.dtype), seen)
        for i, of_head in enumerate(q.chunk(k.shape[1], dim=1))
    ]
    return torch.cat(out, dim=1)


@functools.cache
def _of_few() -> ModuleType | None:
    """The kernel's module, or None where there is no numba, or not the instructions that were asked for."""
    try:
        from mistralcli.kernels.cpu import attention as module
    except ImportError:
        return None
    return module


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen) -> torch.Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask[:, None], enable_gqa=True)
    # Padding sees nothing; any other NaN is of the model, and must show.
    return out.masked_fill((seen.positions < 0)[:, None, :, None], 0.0)


def _unpacked(x: torch.Tensor, scales: torch.Tensor | None, head: int, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values of one key head, (n_seqs, 1, n_slots, head_dim)."""
    own = x[:, head] if scales is None else x[:, head] * scales[:, head, :, None]
    return own.to(dtype)[:, None]
