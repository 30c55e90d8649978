"""Verdicts on what the demo model says: does it loop, does it pass its checks, how many do.

The checks themselves stand in training/talk/heldout.py, beside the prompts that they belong to.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from training.talk.heldout import Check, passes

LOOP_N, LOOP_TIMES, LOOP_TOKENS = 4, 4, 200
"""An answer loops when a run of 4 tokens comes more than 4 times within 200 tokens."""
BARS = {"story": 0.90, "question": 0.85, "chat": 0.0}
"""The share of each kind that must pass; chats are counted and have no bar."""


@dataclass(frozen=True)
class Reply:
    """One turn: what was asked, what was answered, and the verdict on it."""

    prompt: str
    answer: str
    n_tokens: int
    finished: bool
    loops: bool
    passed: bool


@dataclass(frozen=True)
class Transcript:
    """One of the held-out prompts with all its turns; `seed` draws its answers again."""

    kind: str
    seed: int
    replies: tuple[Reply, ...]

    @property
    def passed(self) -> bool:
        return all(reply.passed for reply in self.replies)


def loops(token_ids: Sequence[int]) -> bool:
    """Does any run of LOOP_N ids come more than LOOP_TIMES times within LOOP_TOKENS ids?"""
    runs = list(zip(*(token_ids[i:] for i in range(LOOP_N)), strict=False))
    width = LOOP_TOKENS - LOOP_N + 1
    windows = (runs[start : start + width] for start in range(max(1, len(runs) - width + 1)))
    return any(times > LOOP_TIMES for window in windows for times in Counter(window).values())


def judged(prompt: str, check: Check, answer: str, token_ids: Sequence[int], finished: bool) -> Reply:
    """An answer that loops, or has no end, does not pass."""
    looping = loops(token_ids)
    passed = finished and not looping and passes(check, answer)
    return Reply(prompt, answer, len(token_ids), finished, looping, passed)


@dataclass(frozen=True)
class Score:
    """How many of one kind passed, and the share that must."""

    n_passed: int
    n: int
    bar: float

    @property
    def share(self) -> float:
        return self.n_passed / self.n if self.n else 0.0


def scores(transcripts: Sequence[Transcript]) -> dict[str, Score]:
    """The score of every kind, in the order of BARS."""
    verdicts = {kind: [one.passed for one in transcripts if one.kind == kind] for kind in BARS}
    return {kind: Score(sum(passed), len(passed), BARS[kind]) for kind, passed in verdicts.items()}


def n_looping(transcripts: Sequence[Transcript]) -> int:
    """Answers that loop, of all turns."""
    return sum(reply.loops for one in transcripts for reply in one.replies)
