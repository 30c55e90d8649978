"""What a calibration looks at: windows of a text of the user's, or samples of the model itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mistralcli.cache import KVCache, cache_size_bytes
from mistralcli.config import ModelConfig, read_config
from mistralcli.errors import IntegrityError, UsageError
from mistralcli.evaluate import text_ids
from mistralcli.tokenizer import load_fitting_tokenizer
from mistralcli.weights import load_model, loaded_sizes

SELF = "self"
"""The name of the text that the model writes."""

DEFAULT_TOKENS = 16384
WINDOW = 512
"""Tokens of a sequence."""


@dataclass(frozen=True)
class CalibrationSize:
    """How much a calibration looks at."""

    n_seqs: int
    n_tokens: int


@dataclass(frozen=True)
class CalibrationText:
    """`token_ids`: (n_seqs, n_tokens). `name`: of what they are from."""

    name: str
    token_ids: torch.Tensor


def calibration_size(n_tokens: int, config: ModelConfig) -> CalibrationSize:
    """Whole sequences with that many tokens in all.

    Raises:
        UsageError: they would be less than one.
    """
    window = min(WINDOW, config.max_seq_len)
    if n_tokens < window:
        raise UsageError(f"{n_tokens} tokens are too few to calibrate with", f"at least {window} are needed")
    return CalibrationSize(n_tokens // window, window)


def text_of_file(directory: Path, path: Path, size: CalibrationSize) -> CalibrationText:
    """Windows of a text, evenly spaced, in the ids of the model in `directory`; fewer where it is shorter.

    Each begins with the id that begins texts, where the tokenizer has one.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or is shorter than one window.
    """
    config = read_config(directory)
    tokenizer = load_fitting_tokenizer(directory, config.vocab_size)
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--calib {path} cannot be read as UTF-8 text: {error}", "name a text file"
        ) from error
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = text_ids(tokenizer, text)[len(begin) :]
    room = size.n_tokens - len(begin)
    n_seqs = min(size.n_seqs, len(ids) // room)
    if n_seqs < 1:
        raise UsageError(
            f"{path} has {len(ids)} tokens, of which at least {room} are needed to calibrate",
            "name a longer text",
        )
    step = len(ids) // n_seqs
    windows = [begin + ids[i * step :][:room] for i in range(n_seqs)]
    return CalibrationText(path.name, torch.tensor(windows))


@torch.inference_mode()
def text_of_model(
    directory: Path,
    size: CalibrationSize,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationText:
    """What the model itself writes, sampled with temperature 1 and without an end; the same every time.

    All sequences are written at once, so that the weights are read once for a token of each. `on_progress` gets the
    tokens of a sequence so far and in all.
    """
    config = read_config(directory)
    bos_id = load_fitting_tokenizer(directory, config.vocab_size).bos_id
    model = load_model(directory, device=device, dtype=_own_dtype(config))
    cache = KVCache(
        config, max_seq_len=size.n_tokens, n_seqs=size.n_seqs, slack=1, dtype=model.dtype, device=device
    )
    generator = torch.Generator().manual_seed(0)
    first = (
        torch.full((size.n_seqs,), bos_id)
        if bos_id is not None
        else torch.randint(config.vocab_size, (size.n_seqs,), generator=generator)
    )
    columns = [first]
    for position in range(size.n_tokens - 1):
        positions = torch.full((size.n_seqs, 1), position)
        logits = model.logits(model(columns[-1][:, None].to(device), positions, cache)[:, 0]).cpu()
        if not logits.isfinite().all():
            raise IntegrityError(f"the logits of {directory} are not finite", "it is damaged: pull it again")
        logits[:, list(config.eos_ids)] = -torch.inf
        columns.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
        if on_progress is not None:
            on_progress(position + 1, size.n_tokens - 1)
    return CalibrationText(SELF, torch.stack(columns, dim=1))


def sampling_bytes(directory: Path, size: CalibrationSize) -> int:
    """What `text_of_model` takes of memory for weights and cache."""
    config = read_config(directory)
    dtype = _own_dtype(config)
    cache = cache_size_bytes(config, size.n_tokens, n_seqs=size.n_seqs, slack=1, dtype=dtype)
    return loaded_sizes(directory, dtype, "cpu").total + cache + size.n_seqs * config.vocab_size * 8


def _own_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that the weights are stored in, which needs no copy of them."""
    return {"float16": torch.float16, "float32": torch.float32}.get(config.dtype or "", torch.bfloat16)
