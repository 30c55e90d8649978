"""Losses of a model on held-out text: by kind of text, and by position in a long document."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

from mistralcli.cache import DEFAULT_SLACK, KVCache
from mistralcli.model import Transformer
from training.corpus import heldout_text
from training.encoding import encode

N_CONVERSATIONS = 600
N_QUARTERS, QUARTER_TOKENS, N_DOCUMENTS = 4, 500, 6
CHUNK = 256


@torch.no_grad()
def token_losses(model: Transformer, token_ids: Sequence[int], slack: int = DEFAULT_SLACK) -> torch.Tensor:
    """The loss in nats of every id after the first, read in chunks through the cache: (n_tokens − 1,) float32."""
    ids = torch.tensor([token_ids])
    cache = KVCache(model.config, max_seq_len=len(token_ids), slack=slack, dtype=model.dtype)
    parts = []
    for start in range(0, len(token_ids), CHUNK):
        chunk = ids[:, start : start + CHUNK]
        hidden = model(chunk, torch.arange(start, start + chunk.shape[1])[None], cache)
        parts.append(model.logits(hidden[0]))
    return F.cross_entropy(torch.cat(parts)[:-1], ids[0, 1:], reduction="none")


def texts_by_kind(tokenizer: Path) -> dict[str, list[list[int]]]:
    """The held-out conversations as token ids, by kind."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    found = defaultdict(list)
    for one in heldout_text(N_CONVERSATIONS):
        found[one.kind].append(encode(processor, one.turns))
    return dict(sorted(found.items()))


def losses_by_kind(model: Transformer, texts: dict[str, list[list[int]]]) -> dict[str, float]:
    """The mean loss of each kind, and under "all" that of all tokens."""
    losses = {kind: torch.cat([token_losses(model, ids) for ids in some]) for kind, some in texts.items()}
    return {kind: float(values.mean()) for kind, values in losses.items()} | {
        "all": float(torch.cat(list(losses.values())).mean())
    }


def passages(
    texts: dict[str, list[list[int]]], n_passages: int = N_QUARTERS * N_DOCUMENTS
) -> list[list[int]]:
    """Passages of QUARTER_TOKENS, each of whole conversations until the last, which is cut; all kinds in turn.

    As many as the texts give, `n_passages` at most.
    """
    found: list[list[int]] = [[]]
    for ids in chain.from_iterable(zip_longest(*texts.values(), fillvalue=[])):
        if len(found[-1]) >= QUARTER_TOKENS:
            found.append([])
        found[-1] += ids
    return [ids[:QUARTER_TOKENS] for ids in found if len(ids) >= QUARTER_TOKENS][:n_passages]


def losses_by_quarter(model: Transformer, parts: list[list[int]], slack: int = DEFAULT_SLACK) -> list[float]:
    """The mean loss in each quarter of documents of 2,000 tokens, through a cache with `slack`.

    Every document is read in all four rotations, so that each quarter has the same text and only the position
    differs. The first id of the document has no loss; that of the others' quarters is left out as well.
    """
    rows = []
    for start in range(0, len(parts), N_QUARTERS):
        document = parts[start : start + N_QUARTERS]
        for turn in range(N_QUARTERS):
            rotated = list(chain(*document[turn:], *document[:turn]))
            losses = F.pad(token_losses(model, rotated, slack), (1, 0))
            rows.append(losses.view(N_QUARTERS, QUARTER_TOKENS)[:, 1:].mean(1))
    means: list[float] = torch.stack(rows).mean(0).tolist()
    return means
