"""Attention by PyTorch's fused scaled_dot_product_attention, which never holds all scores at once."""

import torch
import torch.nn.functional as F

from mistralcli.cache import Seen


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen) -> torch.Tensor:
    """See `mistralcli.ops.attention`."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask[:, None], enable_gqa=True)
    return out.nan_to_num(0.0)
