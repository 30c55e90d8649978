"""How well a model predicts a text, and how far its distributions of the next token are from another model's.

Each window of a text runs by itself, from position 0 on. A token is scored once, with the context that its window gives
it: what transformers' guide to the perplexity of fixed-length models measures for the same window and stride.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mistralcli.config import ModelConfig
from mistralcli.errors import MistralError, UsageError
from mistralcli.layerwise import LayerwiseModel
from mistralcli.scoring import OnProgress, cut_windows, score_tokens
from mistralcli.tokenizer import Tokenizer

DEFAULT_WINDOW = 2048
"""Tokens: the length at which papers on quantization state perplexities."""

_LARGEST_EXPONENT = 700.0
"""Of a perplexity that a float can hold."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` is exp of the mean negative log-likelihood `nll`, in nats a token, of the `n_tokens` scored ones.

    `window` and `stride`, in tokens, are those that it was measured with.
    """

    perplexity: float
    stderr: float
    nll: Estimate
    n_tokens: int
    window: int
    stride: int


@dataclass(frozen=True)
class Divergence:
    """How far a model is from a base: KL(base ‖ model) by token, in nats, and how often the likeliest is the same."""

    model: Perplexity
    base: Perplexity
    kl: Estimate
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: Estimate


def measure_perplexity(
    model: LayerwiseModel,
    token_ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    free_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> Perplexity:
    """The perplexity of a text in windows of `window` tokens, one every `stride` tokens.

    The window is `DEFAULT_WINDOW` by default, or the model's longest; the stride is the window: no overlap.
    free_bytes: what it may take; by default what the device has.

    Raises:
        UsageError: the text is too short, or window or stride cannot be.
        NotEnoughMemoryError: not even one batch fits in memory.
        MistralError: the model's logits are not finite.
    """
    lengths = _lengths(model.config, window, stride)
    windows = cut_windows(len(token_ids), *lengths)
    (nll,) = score_tokens([model], token_ids, windows, _nll, free_bytes=free_bytes, on_progress=on_progress)
    return _perplexity(nll, *lengths)


def measure_divergence(
    model: LayerwiseModel,
    base: LayerwiseModel,
    token_ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    free_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> Divergence:
    """How far `model` is from `base` on a text, in windows as in `measure_perplexity`; raises what that does."""
    sizes = (model.config.vocab_size, base.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the two models give logits of {sizes[0]} and {sizes[1]} tokens",
            "compare a model with a build of it",
        )
    shorter = min(model.config, base.config, key=lambda config: config.max_seq_len)
    lengths = _lengths(shorter, window, stride)
    windows = cut_windows(len(token_ids), *lengths)
    nll, base_nll, kl, agrees = score_tokens(
        [model, base], token_ids, windows, _compared, free_bytes=free_bytes, on_progress=on_progress
    )
    in_order = kl.sort().values
    return Divergence(
        model=_perplexity(nll, *lengths),
        base=_perplexity(base_nll, *lengths),
        kl=estimate(kl),
        kl_median=float(in_order[len(kl) // 2]),
        kl_p99=float(in_order[math.ceil(0.99 * len(kl)) - 1]),
        kl_max=float(in_order[-1]),
        top1_agreement=estimate(agrees),
    )


def text_ids(tokenizer: Tokenizer, text: str, max_tokens: int | None = None) -> list[int]:
    """The ids of a text, with the one in front that begins texts where the tokenizer has one."""
    return tokenizer.encode(text, bos=True)[:max_tokens]


def require_same_tokens(model: Tokenizer, base: Tokenizer) -> None:
    """Raise UsageError unless each id means the same to both: else distributions cannot be compared."""
    ids = range(max(model.vocab_size, base.vocab_size))
    different = next((i for i in ids if _meaning(model, i) != _meaning(base, i)), None)
    if different is None and model.bos_id == base.bos_id:
        return
    where = "how a text begins" if different is None else f"what the id {different} stands for"
    raise UsageError(
        f"the two models have different tokenizers: they differ in {where}",
        "compare a model with a build of it, or with another that has the same tokenizer",
    )


def _meaning(tokenizer: Tokenizer, token_id: int) -> tuple[bytes | None, str | None]:
    return tokenizer.token_bytes(token_id), tokenizer.control_name(token_id)


def estimate(values: torch.Tensor) -> Estimate:
    """The mean of values (n_tokens,) in the text's order, and its standard error.

    Neighbours are correlated, so the error is that of the means of blocks of ⌊√n⌋ tokens, taken as independent.
    """
    length = math.isqrt(len(values))
    blocks = values[: len(values) // length * length].view(-1, length).mean(dim=1)
    return Estimate(float(values.mean()), float(blocks.std() / math.sqrt(len(blocks))))


def _perplexity(nll: torch.Tensor, window: int, stride: int) -> Perplexity:
    """The error of exp(x) is that of x times exp(x), to first order."""
    mean = estimate(nll)
    perplexity = math.exp(min(mean.mean, _LARGEST_EXPONENT))
    return Perplexity(perplexity, perplexity * mean.stderr, mean, len(nll), window, stride)


def _lengths(config: ModelConfig, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride, the defaults filled in."""
    longest = config.max_seq_len
    window = min(DEFAULT_WINDOW, longest) if window is None else window
    if not 2 <= window <= longest:
        raise UsageError(
            f"--window {window} is not between 2 and the model's own context of {longest} positions",
            f"leave it out for {min(DEFAULT_WINDOW, longest)}",
        )
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(
            f"--stride {stride} is not between 1 and the window's {window} tokens",
            "leave it out for windows side by side",
        )
    return window, stride


@dataclass(frozen=True)
class _Softmax:
    """Of logits (n_tokens, vocab_size): the likeliest token, exp of them less the largest, its sum, and log Σ exp."""

    likeliest: torch.Tensor
    exp: torch.Tensor
    sum: torch.Tensor
    log_sum: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor) -> "_Softmax":
        """Sums are float64: by float32's over a vocabulary of 49,152, log_softmax was off by 8e-6."""
        largest, likeliest = logits.max(-1)
        exp = (logits - largest[:, None]).exp_()
        total = exp.sum(-1, dtype=torch.float64)
        log_sum = largest + total.log()
        if not log_sum.isfinite().all():
            raise MistralError(
                "the model's logits are not finite",
                "it is damaged, or --dtype is too narrow: try --dtype float32",
            )
        return _Softmax(likeliest, exp, total, log_sum)


def _nll(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """−log p of each target."""
    return (_Softmax.of(logits).log_sum - _chosen(targets, logits))[None]


def _compared(targets: torch.Tensor, logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """nll, the base's nll, KL(base ‖ model), and 1 where the likeliest token is the same.

    With logits x of the model and y of the base, and p = softmax(y): KL = Σ p·(y − x) + log Σ exp x − log Σ exp y.
    """
    model, base = _Softmax.of(logits), _Softmax.of(base_logits)
    weighted = base.exp.mul_(base_logits - logits).sum(-1, dtype=torch.float64)
    kl = weighted / base.sum + model.log_sum - base.log_sum
    agrees = (model.likeliest == base.likeliest).double()
    nll, base_nll = model.log_sum - _chosen(targets, logits), base.log_sum - _chosen(targets, base_logits)
    return torch.stack([nll, base_nll, kl, agrees])


def _chosen(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0].double()
