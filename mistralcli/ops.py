"""The operators of the model as plain PyTorch: each is the definition that its kernels are tested against.

Dimension names: n_seqs sequences of n_tokens tokens; n_heads query heads and n_kv_heads key/value heads of
head_dim; n_slots slots of the cache.
"""

import math

import torch
import torch.nn.functional as F

from mistralcli.cache import Seen
from quant.registry import op


@op(cpu="mistralcli.kernels.cpu.pointwise:rms_norm", cuda="mistralcli.kernels.pointwise:rms_norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · weight`, computed in float32 (Zhang & Sennrich 2019, section 3).

    x: (..., dim); weight: (dim,). Returns x's shape and dtype.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `position · theta^(−2i/head_dim)` for i < head_dim/2 (Su et al. 2021, section 3.2.2).

    positions: (n_seqs, n_tokens). Returns two float32 tensors (n_seqs, n_tokens, head_dim / 2). The angles are
    float64, since a float32 angle at position 128k is off by up to 0.008 radians.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.to(torch.float64)[..., None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


@op(cpu="mistralcli.kernels.cpu.pointwise:apply_rotary", cuda="mistralcli.kernels.pointwise:apply_rotary")
def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + head_dim/2]) by their angles: the "rotate-half" pairing of Hugging Face's weights.

    x: (n_seqs, n_tokens, n_heads, head_dim); cos, sin: (n_seqs, n_tokens, head_dim / 2). Returns x's shape and
    dtype; the rotation is computed in float32.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # (n_seqs, n_tokens, 1, head_dim / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@op(cpu="mistralcli.kernels.sdpa:attention", cuda="mistralcli.kernels.flash_attention:attention")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Seen,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`softmax(q kᵀ / sqrt(head_dim)) v` over the slots that are seen, n_heads / n_kv_heads query heads to a key head.

    Grouped-query attention (Ainslie et al. 2023) with multi-head (n_kv_heads = n_heads) and multi-query
    (n_kv_heads = 1) as its special cases.

    q: (n_seqs, n_heads, n_tokens, head_dim); k, v: (n_seqs, n_kv_heads, n_slots, head_dim), which hold what the
    ring of `seen` holds after its positions were written. Where they are int8, a key is k · key_scales and a value
    v · value_scales, both (n_seqs, n_kv_heads, n_slots): one factor for a score, one for a weight.

    Returns q's shape and dtype; scores and softmax are float32. A query that sees nothing (padding) gets zeros.
    """
    n_kv_heads, head_dim = k.shape[1], q.shape[-1]
    grouped = q.float().unflatten(1, (n_kv_heads, -1))
    # grouped: (n_seqs, n_kv_heads, group, n_tokens, head_dim); scores: (…, group, n_tokens, n_slots)
    scores: torch.Tensor = grouped @ k.float()[:, :, None].mT / math.sqrt(head_dim)
    if key_scales is not None:
        scores = scores * key_scales[:, :, None, None]
    weights = scores.masked_fill(~seen.mask[:, None, None], -math.inf).softmax(dim=-1)
    weights = weights.masked_fill((seen.positions < 0)[:, None, None, :, None], 0.0)
    if value_scales is not None:
        weights = weights * value_scales[:, :, None, None]
    return (weights @ v.float()[:, :, None]).flatten(1, 2).to(q.dtype)


@op(cpu="mistralcli.kernels.cpu.pointwise:swiglu", cuda="mistralcli.kernels.pointwise:swiglu")
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) · up` (Shazeer 2020). Both (..., hidden_dim); returns the same shape and dtype."""
    return F.silu(gate) * up


@op(cpu="mistralcli.kernels.cpu.dense:tied_logits")
def tied_logits(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`hidden tableᵀ`: logits where the embedding is the head; on the CPU its table stays in the type it is stored in.

    hidden: (..., dim); table: (vocab_size, dim), of any float type. Returns (..., vocab_size) float32, computed in
    hidden's dtype.
    """
    return F.linear(hidden, table.to(hidden.dtype)).float()
