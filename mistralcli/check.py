"""Whether a build still says what its source says, on a short text that comes with the program."""

import hashlib
from pathlib import Path

import torch

from mistralcli import scoring
from mistralcli.config import ModelConfig
from mistralcli.errors import IntegrityError
from mistralcli.evaluate import measure_divergence, text_ids
from mistralcli.layerwise import LayerwiseModel
from mistralcli.scoring import OnProgress
from mistralcli.tokenizer import load_fitting_tokenizer
from quant.quality import LeftOut, Quality

CHECK_TEXT = Path(__file__).parent / "check_text.txt"
"""Prose, dialogue, code, numbers, lists and tables, in five languages, written for this: 2,144 tokens for SmolLM2."""

WINDOW = 512

_N_TOKENS, _N_TOKENS_OF_LARGE = 1024, 512
_LARGE = 1_500_000_000
"""From so many weights on half as much has to do: two cores take minutes for it with 7 billion."""


def check_build(
    source_dir: Path,
    build_dir: Path,
    *,
    device: torch.device | str = "cpu",
    free_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> Quality | LeftOut:
    """Compare a build with its source on `CHECK_TEXT`, layer by layer: in the memory of one layer, on `device`.

    free_bytes: what it may take of memory; by default what the device has.

    Raises:
        NotEnoughMemoryError: it does not fit.
        IntegrityError, MistralError: one of the two cannot be loaded, or its logits are not finite.
    """
    source, build = (LayerwiseModel(path, device=device) for path in (source_dir, build_dir))
    try:
        tokenizer = load_fitting_tokenizer(source_dir, source.config.vocab_size)
    except IntegrityError as error:
        return LeftOut(error.message)
    data = CHECK_TEXT.read_bytes()
    window = min(WINDOW, source.config.max_seq_len)
    ids = text_ids(tokenizer, data.decode(), n_check_tokens(source.config))
    found = measure_divergence(
        build, source, ids, window=window, free_bytes=free_bytes, on_progress=on_progress
    )
    return Quality(
        text=CHECK_TEXT.name,
        sha256=hashlib.sha256(data).hexdigest(),
        n_tokens=found.model.n_tokens,
        window=window,
        perplexity_before=found.base.perplexity,
        perplexity_after=found.model.perplexity,
        kl_mean=found.kl.mean,
        kl_stderr=found.kl.stderr,
        kl_median=found.kl_median,
        kl_p99=found.kl_p99,
        kl_max=found.kl_max,
        top1_agreement=found.top1_agreement.mean,
    )


def needed_bytes(source_dir: Path) -> int:
    """What `check_build` takes of memory at least, on the CPU; a build takes no more than its source."""
    source = LayerwiseModel(source_dir)
    window = min(WINDOW, source.config.max_seq_len)
    windows = scoring.cut_windows(n_check_tokens(source.config), window, window)
    return scoring.needed_bytes([source, source], windows)


def n_check_tokens(config: ModelConfig) -> int:
    """How much of the text a model is checked on, at most."""
    attention = config.dim * config.head_dim * 2 * (config.n_heads + config.n_kv_heads)
    n_weights = config.n_layers * (attention + 3 * config.dim * config.hidden_dim)
    return _N_TOKENS if n_weights < _LARGE else _N_TOKENS_OF_LARGE
