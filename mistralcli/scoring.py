"""Every token of a text scored by one or more models, window by window, in the memory of one layer.

All windows of a pass go through a layer before the next is loaded. Then they go through the heads a tile of tokens at a
time: the logits of a whole window, with a vocabulary of 131,072, would outweigh the layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from mistralcli.config import ModelConfig
from mistralcli.device import free_memory_bytes
from mistralcli.errors import NotEnoughMemoryError, UsageError
from mistralcli.layerwise import Head, LayerwiseModel
from mistralcli.plan import Demand, plan_memory
from mistralcli.units import size_text
from quant.progress import Progress

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Of windows that go through a layer together; a longer window goes alone."""
_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""How many logits of a model are in memory at once: 34 MB and 1.1 GB of float32."""
_LOGITS_COPIES = 8
"""What two models' logits take while they are compared, by the size of one's."""
_MOST_HIDDEN_BYTES = {"cpu": 4 << 30, "cuda": 32 << 30}
"""Of hidden states in a pass: more would save no more than the reading of weights."""

OnProgress = Callable[[int, int], None]
"""Called with the steps done so far and in all."""

Score = Callable[..., torch.Tensor]
"""Of the next tokens' ids (n_tokens,) and each model's logits (n_tokens, vocab_size): (n_scores, n_tokens) float64."""


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a text, run together; those from `first` on are scored."""

    start: int
    first: int
    stop: int

    @property
    def n_tokens(self) -> int:
        return self.stop - self.start


def cut_windows(n_tokens: int, window: int, stride: int) -> list[Window]:
    """Windows every `stride` tokens up to the text's end; each token is scored in the first that has it.

    A window's first token has nothing before it: where windows do not overlap, it is not scored.

    Raises:
        UsageError: the text is too short for two tokens to be scored.
    """
    windows: list[Window] = []
    scored = 0
    for start in range(0, n_tokens, stride):
        stop = min(start + window, n_tokens)
        windows.append(Window(start, max(scored, start + 1), stop))
        scored = stop
        if stop == n_tokens:
            break
    windows = [one for one in windows if one.first < one.stop]
    if sum(one.stop - one.first for one in windows) < 2:
        raise UsageError(f"a text of {n_tokens} tokens is too short to be measured", "give it a longer one")
    return windows


@torch.inference_mode()
def score_tokens(
    models: Sequence[LayerwiseModel],
    token_ids: Sequence[int],
    windows: Sequence[Window],
    score: Score,
    *,
    free_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> torch.Tensor:
    """What `score` says of every token that is scored, in the text's order: (n_scores, n_tokens) float64 on the CPU.

    free_bytes: what it may take; by default what the models' device has.

    Raises:
        NotEnoughMemoryError: not even one batch fits.
    """
    batches = _batches(windows, _batch_tokens(models[0], windows))
    passes = list(_passes(batches, models, _hidden_room_bytes(models, windows, free_bytes)))
    head_steps = sum(_head_steps(model.config) for model in models)
    layer_steps = sum(model.config.n_layers for model in models)
    # A step is a batch in a layer; one in a head counts for several.
    progress = Progress(on_progress, (head_steps + layer_steps) * len(batches))
    ids = torch.tensor(token_ids)
    found: list[torch.Tensor] = []
    for chosen in passes:
        hidden = [_hidden(model, ids, chosen, progress) for model in models]
        heads = [model.head() for model in models]
        for batch, *states in zip(chosen, *hidden, strict=True):
            found += _batch_scores(ids, batch, heads, states, score)
            progress.advance(head_steps)
        del hidden, heads, batch, states  # or the next pass would stand beside this one
    return torch.cat(found, dim=1)


def _batch_tokens(model: LayerwiseModel, windows: Sequence[Window]) -> int:
    """How many tokens go through a layer at once: as many as the device likes, at most all, at least a window."""
    usual = min(_by_device(_BATCH_TOKENS, model), sum(window.n_tokens for window in windows))
    return max(usual, windows[0].n_tokens)


def _by_device(table: dict[str, int], model: LayerwiseModel) -> int:
    return table.get(model.device.type, table["cpu"])


def _batches(windows: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """Windows of one length together, in their order."""
    batches = []
    for n_tokens, group in groupby(windows, key=lambda window: window.n_tokens):
        same, n_seqs = list(group), max(1, batch_tokens // n_tokens)
        batches += [same[i : i + n_seqs] for i in range(0, len(same), n_seqs)]
    return batches


def _passes(
    batches: Sequence[list[Window]], models: Sequence[LayerwiseModel], room_bytes: int
) -> Iterator[list[list[Window]]]:
    """Batches whose hidden states fit in `room_bytes` together; each pass reads the models' weights once."""
    chosen: list[list[Window]] = []
    left = room_bytes
    for batch in batches:
        size = sum(window.n_tokens for window in batch) * _token_bytes(models)
        if chosen and size > left:
            yield chosen
            chosen, left = [], room_bytes
        chosen.append(batch)
        left -= size
    yield chosen


def _token_bytes(models: Sequence[LayerwiseModel]) -> int:
    return sum(model.config.dim * model.dtype.itemsize for model in models)


def _hidden_room_bytes(
    models: Sequence[LayerwiseModel], windows: Sequence[Window], free_bytes: int | None
) -> int:
    """What is left for hidden states beside a layer, what a batch takes in it, and logits.

    Raises:
        NotEnoughMemoryError: not even those of one batch fit.
    """
    free = free_memory_bytes(models[0].device) if free_bytes is None else free_bytes
    needed = needed_bytes(models, windows)
    n_tokens = _batch_tokens(models[0], windows)
    if free < needed:
        raise NotEnoughMemoryError(
            f"measuring takes {size_text(needed)} at {n_tokens} tokens at once, and {size_text(free)} are free",
            "close other programs, or ask for a shorter --window",
        )
    room = free - needed + n_tokens * _token_bytes(models)
    return min(room, _by_device(_MOST_HIDDEN_BYTES, models[0]))


def needed_bytes(models: Sequence[LayerwiseModel], windows: Sequence[Window]) -> int:
    """The least memory in which `score_tokens` works: that of a pass with one batch."""
    n_tokens = _batch_tokens(models[0], windows)
    n_logits = min(_by_device(_LOGITS, models[0]), n_tokens * models[0].config.vocab_size)
    logits_bytes = n_logits * torch.float32.itemsize * _LOGITS_COPIES
    heads_bytes = sum(model.config.vocab_size * model.config.dim * model.dtype.itemsize for model in models)
    layer_bytes = max(_layer_bytes(model, n_tokens) for model in models)
    return max(layer_bytes, logits_bytes + heads_bytes) + n_tokens * _token_bytes(models)


def _layer_bytes(model: LayerwiseModel, n_tokens: int) -> int:
    """What a layer and a batch in it take."""
    one_layer = replace(model.config, n_layers=1, sliding_windows=(None,))
    demand = Demand(model.largest_layer_bytes, model.dtype, n_tokens, n_tokens, model.device.type)
    return plan_memory(one_layer, demand, n_tokens, 0).total_bytes


def _head_steps(config: ModelConfig) -> int:
    """The head's work by that of a layer, in multiplications."""
    width = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    return max(1, round(config.vocab_size / (width + 3 * config.hidden_dim)))


def _hidden(
    model: LayerwiseModel, ids: torch.Tensor, batches: Sequence[Sequence[Window]], progress: Progress
) -> list[torch.Tensor]:
    """The last layer's output for each batch, (n_seqs, n_tokens, dim)."""
    hidden = [
        model.embed(torch.stack([ids[window.start : window.stop] for window in batch])) for batch in batches
    ]
    for index in range(model.config.n_layers):
        layer = model.layer(index)
        for i in range(len(hidden)):
            hidden[i] = model.run_layer(layer, hidden[i])
            progress.advance(1)
        del layer  # before the next is loaded
    return hidden


def _batch_scores(
    ids: torch.Tensor,
    batch: Sequence[Window],
    heads: Sequence[Head],
    states: Sequence[torch.Tensor],
    score: Score,
) -> Iterator[torch.Tensor]:
    """Scores of a batch's tokens, a tile of logits at a time: token t is predicted by the state of t − 1."""
    device = states[0].device
    targets = torch.cat([ids[window.first : window.stop] for window in batch]).to(device)
    scored = [_scored_states(hidden, batch) for hidden in states]  # each (n_scored, dim)
    tile = max(1, _LOGITS.get(device.type, _LOGITS["cpu"]) // heads[0].vocab_size)
    for start in range(0, len(targets), tile):
        rows = slice(start, start + tile)
        logits = (head(state[rows]) for head, state in zip(heads, scored, strict=True))
        yield score(targets[rows], *logits).cpu()


def _scored_states(hidden: torch.Tensor, batch: Sequence[Window]) -> torch.Tensor:
    """The states that predict what is scored, window after window."""
    parts = [one[window.first - window.start - 1 : -1] for one, window in zip(hidden, batch, strict=True)]
    return torch.cat(parts)
