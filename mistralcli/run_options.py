"""How a model is run and how its tokens are chosen: values that are checked without importing torch."""

import math
from dataclasses import dataclass

from mistralcli.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalty 1 do nothing.

    Raises:
        UsageError: a value is out of its range, which is named.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _require(
            "repeat_penalty", self.repeat_penalty, 0.01 <= self.repeat_penalty <= 100, "between 0.01 and 100"
        )
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")


def _require(name: str, value: object, good: bool, what: str) -> None:
    if not good:
        raise UsageError(f"{name} is {value}; it must be {what}")


def room_for_answer(max_seq_len: int) -> int:
    """Tokens that are kept for an answer of unknown length where a prompt is cut or turns are dropped."""
    return min(256, max_seq_len // 8)


@dataclass(frozen=True)
class SessionOptions:
    """How a model is run; None leaves a choice to the program. `ctx`, `chunk` and `slack` count positions."""

    ctx: int | None = None
    chunk: int | None = None
    slack: int | None = None
    device: str | None = None
    dtype: str | None = None
    memory_limit: int | None = None
    """Bytes that the process may take on a GPU; on the CPU, that the model is planned to take."""
    kv: str | None = None
    threads: int | None = None
    """Of the CPU, for all that the process computes there."""
    exact: bool = False
    """Float32 activations that no kernel of the CPU rounds."""
    n_seqs: int = 1
    """Sequences that are decoded together, each with a context of its own."""

    def __post_init__(self) -> None:
        for name, value in (("chunk", self.chunk), ("slack", self.slack)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} must be at least 1")
