"""Distributions of the next token over a text, and how far they are from one another."""

import torch

from mistralcli.cache import KVCache
from mistralcli.model import Transformer


@torch.no_grad()
def log_probs(
    model: Transformer,
    ids: list[int],
    window: int,
    chunk: int | None = None,
    cache_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(n_tokens, vocab_size) on the CPU, window by window, each in chunks of `chunk` tokens or whole."""
    chunk, found = chunk or window, []
    for start in range(0, len(ids), window):
        part = torch.tensor(ids[start : start + window])[None]
        cache = KVCache(model.config, max_seq_len=window, dtype=cache_dtype)
        for first in range(0, part.shape[1], chunk):
            tokens = part[:, first : first + chunk]
            hidden = model(tokens, torch.arange(first, first + tokens.shape[1])[None], cache)
            found.append(model.logits(hidden[0]).log_softmax(-1))
    return torch.cat(found)


def kl_by_token(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats of each token, from log-probabilities (n_tokens, vocab_size)."""
    return (p.exp() * (p - q)).sum(-1)
