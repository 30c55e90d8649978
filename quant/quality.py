"""What a build lost against its source, measured on a text by who can run models, for the card and its gate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.scheme import Scheme


def default_max_kl(scheme: Scheme) -> float:
    """The mean KL, in nats a token, that a usable build does not exceed: 1 with 4 bits, 0.1 with 8.

    SmolLM2-135M, a small model that loses much, has 0.51 in groups of 128, rounded to nearest: perplexity grows by a
    third. With one scale a row it has 1.34, perplexity is three times as high, and that fails. What is broken has more.
    """
    return 1.0 if scheme.max_error > 0.1 else 0.1


@dataclass(frozen=True)
class Quality:
    """How a build predicts a text beside its source: KL(source ‖ build) by token in nats, and both perplexities.

    text: the text's name; sha256: of its bytes. n_tokens: how many were scored, in windows of `window`.
    """

    text: str
    sha256: str
    n_tokens: int
    window: int
    perplexity_before: float
    perplexity_after: float
    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float

    def for_card(self) -> dict[str, Any]:
        """As the card states it, with five digits: the last ones of a float depend on the number of threads."""
        return {
            "text": {
                "name": self.text,
                "sha256": self.sha256,
                "n_tokens": self.n_tokens,
                "window": self.window,
            },
            "perplexity": {
                "before": _rounded(self.perplexity_before),
                "after": _rounded(self.perplexity_after),
            },
            "kl": {
                "mean": _rounded(self.kl_mean),
                "stderr": _rounded(self.kl_stderr),
                "median": _rounded(self.kl_median),
                "p99": _rounded(self.kl_p99),
                "max": _rounded(self.kl_max),
            },
            "top1_agreement": _rounded(self.top1_agreement),
            "left_out": None,
        }


@dataclass(frozen=True)
class LeftOut:
    """Why nothing was measured."""

    reason: str

    def for_card(self) -> dict[str, Any]:
        """As the card states it."""
        return {"text": None, "perplexity": None, "kl": None, "top1_agreement": None, "left_out": self.reason}


Check = Callable[[Path], Quality | LeftOut]
"""Measures the build in a directory, all of whose files but the card are there."""


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
