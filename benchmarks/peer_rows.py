"""What engines that take turns gave: a row of a table of medians, and of ratios within a round."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from worker_protocol import Worker

N_CHECKED, N_ALIKE = 8, 6
"""Prompts that engines answer before anything is measured, and to how many they have to choose the same first id. Two
that round differently part where two ids are about as likely; two that compute different functions seldom agree."""


@dataclass(frozen=True)
class Bar:
    """What is asked for: that `ours` is at least `at_least` times as good as `peer`, which may be `READ`."""

    ours: str
    peer: str
    at_least: float


READ = "plain read"
"""The peer of a share of the memory's bandwidth: how often a second all that a token reads could be read."""


@dataclass(frozen=True)
class Row:
    """A line of the table: medians by engine, and for each bar the median of the ratios within a round.

    others: the share of the processors that other processes took meanwhile, the median; None where it is not known.
    """

    name: str
    unit: str
    figures: Mapping[str, float]
    ratios: Sequence[tuple[Bar, float]]
    others: float | None

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        ratios = [
            f"{ratio:.2f} of {bar.peer} ({'meets' if ratio >= bar.at_least else 'MISSES'} {bar.at_least:g})"
            for bar, ratio in self.ratios
        ]
        others = "" if self.others is None else f" | others took {self.others:.0%}"
        return f"{self.name}, {self.unit}: {figures} | {', '.join(ratios)}{others}"


def row_of(
    name: str,
    unit: str,
    rounds: Sequence[Mapping[str, float]],
    bars: Sequence[Bar],
    others: float | None = None,
) -> Row:
    """A row of what each round gave by engine."""
    figures = {engine: statistics.median(one[engine] for one in rounds) for engine in rounds[0]}
    ratios = [(bar, statistics.median(one[bar.ours] / one[bar.peer] for one in rounds)) for bar in bars]
    return Row(name, unit, figures, ratios, others)


def require_agreement(workers: Mapping[str, Worker], vocab_size: int) -> None:
    """Raise SystemExit unless all compute the same function as the first: nothing else is worth a comparison."""
    prompts = [random_ids(16, seed, vocab_size) for seed in range(N_CHECKED)]
    chosen = {
        name: [worker.ask("generate", ids=ids, n=1)["ids"][0] for ids in prompts]
        for name, worker in workers.items()
    }
    first = next(iter(chosen.values()))
    for name, ids in chosen.items():
        if sum(one == other for one, other in zip(ids, first, strict=True)) < N_ALIKE:
            raise SystemExit(f"{name} does not compute the same function: {chosen}")


def random_ids(n: int, seed: int, vocab_size: int) -> list[int]:
    """A prompt whose first id is that of no other seed, so that a cache of the one before is of no use."""
    choose = Random(seed)
    return [seed, *(choose.randrange(vocab_size) for _ in range(n - 1))]
