"""The Mistral transformer: RMSNorm, rotary embedding, grouped-query sliding-window attention, SwiGLU.

Module names are mistral-inference's. The model knows nothing of quantization: `linear` makes its layers.
Parameters are made empty, for `weights` to fill: torch's own layers would initialize them, and on the meta device
that imports a second's worth of modules.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mistralcli.cache import KVCache, LayerCache, Piece
from mistralcli.config import ModelConfig
from mistralcli.ops import apply_rotary, attention, rms_norm, rotary_tables, swiglu, tied_logits

LinearFactory = Callable[[str, int, int], nn.Module]
"""Makes a linear layer without bias from its name in the model, in_features and out_features."""


class Linear(nn.Module):
    """`x wᵀ`: (..., in_features) to (..., out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def dense_linear(name: str, in_features: int, out_features: int) -> nn.Module:
    """The factory for unquantized weights."""
    return Linear(in_features, out_features)


class Embedding(nn.Module):
    """Rows of a table: token ids (...) to (..., dim)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the ring: write the new keys and values, then attend."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = linear(f"{name}.wq", config.dim, q_dim)
        self.wk = linear(f"{name}.wk", config.dim, kv_dim)
        self.wv = linear(f"{name}.wv", config.dim, kv_dim)
        self.wo = linear(f"{name}.wo", q_dim, config.dim)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: LayerCache, pieces: list[Piece]
    ) -> torch.Tensor:
        heads = (-1, self.head_dim)
        q = apply_rotary(self.wq(x).unflatten(-1, heads), cos, sin)  # (n_seqs, n_tokens, n_heads, head_dim)
        k = apply_rotary(
            self.wk(x).unflatten(-1, heads), cos, sin
        )  # (n_seqs, n_tokens, n_kv_heads, head_dim)
        v = self.wv(x).unflatten(-1, heads)
        out = torch.cat([self._attend(q, k, v, cache, piece) for piece in pieces], dim=1)
        projected: torch.Tensor = self.wo(out.flatten(2))  # (n_seqs, n_tokens, dim)
        return projected

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, piece: Piece
    ) -> torch.Tensor:
        cache.write(k[:, piece.tokens], v[:, piece.tokens], piece)
        return attention(q[:, piece.tokens].transpose(1, 2), *cache.read(piece)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.w1 = linear(f"{name}.w1", config.dim, config.hidden_dim)
        self.w2 = linear(f"{name}.w2", config.hidden_dim, config.dim)
        self.w3 = linear(f"{name}.w3", config.dim, config.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(swiglu(self.w1(x), self.w3(x)))
        return out


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, linear, f"{name}.attention")
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config, linear, f"{name}.feed_forward")

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: LayerCache, pieces: list[Piece]
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, pieces)
        out: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Transformer(nn.Module):
    """Token ids to hidden states, and hidden states to logits; `dtype` is the type it computes in.

    With tied embeddings there is no `output`: the embedding is the head.
    """

    def __init__(
        self, config: ModelConfig, linear: LinearFactory = dense_linear, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(config, linear, f"layers.{i}") for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied_embeddings else linear("output", config.dim, config.vocab_size)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        pieces: list[Piece] | None = None,
    ) -> torch.Tensor:
        """Run a chunk of each sequence and store its keys and values in the cache.

        token_ids, positions: (n_seqs, n_tokens) int64; position −1 marks padding, which may carry any id. Positions may
        stay on the CPU, where the cache's sizes come from them without a wait. pieces: those of the chunk, where the
        cache has begun it already.
        Returns the normalized hidden states (n_seqs, n_tokens, dim).
        """
        pieces = cache.begin(positions) if pieces is None else pieces
        cos, sin = rotary_tables(positions.to(token_ids.device), self.config.head_dim, self.config.rope_theta)
        x = self.tok_embeddings(token_ids).to(self.dtype)  # (n_seqs, n_tokens, dim)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, cos, sin, layer_cache, pieces)
        hidden: torch.Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, float32: (..., dim) to (..., vocab_size)."""
        if self.output is None:
            return tied_logits(hidden, self.tok_embeddings.weight)
        logits: torch.Tensor = self.output(hidden)
        return logits.float()
