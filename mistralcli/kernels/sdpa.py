"""Attention by PyTorch's fused scaled_dot_product_attention, which never holds all scores at once."""

import torch
import torch.nn.functional as F

from mistralcli.cache import Seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Seen,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mistralcli.ops.attention`."""
    if key_scales is None or value_scales is None:
        return _attended(q, k.to(q.dtype), v.to(q.dtype), seen)
    # An int8 cache is unpacked one key head at a time, lest it be in memory twice.
    out = [
        _attended(of_head, _unpacked(k, key_scales, i, q.dtype), _unpacked(v, value_scales, i, q.dtype), seen)
        for i, of_head in enumerate(q.chunk(k.shape[1], dim=1))
    ]
    return torch.cat(out, dim=1)


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen) -> torch.Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask[:, None], enable_gqa=True)
    return out.nan_to_num(0.0)


def _unpacked(x: torch.Tensor, scales: torch.Tensor, head: int, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values of one key head, (n_seqs, 1, n_slots, head_dim)."""
    return (x[:, head] * scales[:, head, :, None]).to(dtype)[:, None]
