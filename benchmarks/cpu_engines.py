"""Engines that take turns: the processes of `cpu_vs_llamacpp.py`, and a row of its table from what they take."""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cpu_llama_build import library_folder
from cpu_protocol import Load, Worker

from mistralcli.config import read_config

OURS, OURS_AVX2, TRANSFORMERS = "ours", "ours AVX2", "transformers bf16"
STOCK, PATCHED, STOCK_AVX2 = "llama.cpp", "llama.cpp with prefetch", "llama.cpp AVX2"
LIBRARIES = {STOCK: "stock", PATCHED: "prefetch", STOCK_AVX2: "avx2"}

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

    others: the share of the processors that other processes took meanwhile, the median.
    """

    name: str
    unit: str
    figures: Mapping[str, float]
    ratios: Sequence[tuple[Bar, float]]
    others: float

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        ratios = [
            f"{ratio:.2f} of {bar.peer} ({'meets' if ratio >= bar.at_least else 'MISSES'} {bar.at_least:g})"
            for bar, ratio in self.ratios
        ]
        return f"{self.name}, {self.unit}: {figures} | {', '.join(ratios)} | others took {self.others:.0%}"


@dataclass(frozen=True)
class Engines:
    """How engines are started. work: the folder of builds and libraries."""

    work: Path
    llama_python: Path
    threads: int
    rounds: int

    def start(self, name: str) -> Worker:
        """The process of an engine, before it has a model."""
        here = Path(__file__).parent
        if name in LIBRARIES:
            library = library_folder(self.work, LIBRARIES[name]).resolve()
            command = [str(self.llama_python), str(here / "cpu_worker_llama.py")]
            return Worker(command, {"LD_LIBRARY_PATH": str(library)})
        script = "transformers" if name == TRANSFORMERS else "ours"
        cap = {"MISTRAL_CLI_CPU": "avx2"} if name == OURS_AVX2 else {}
        return Worker([sys.executable, str(here / f"cpu_worker_{script}.py")], cap)

    @contextmanager
    def loaded(self, names: Sequence[str], model: Path, ctx: int) -> Iterator[dict[str, Worker]]:
        """Engines with a model, a build with its `model.gguf`, once they have agreed about it."""
        with ExitStack() as stack:
            workers = {name: stack.enter_context(self.start(name)) for name in names}
            for name, worker in workers.items():
                path = model / "model.gguf" if name in LIBRARIES else model
                worker.ask("load", model=str(path), threads=self.threads, ctx=ctx)
            peers = {name: worker for name, worker in workers.items() if name != TRANSFORMERS}
            require_agreement(peers, read_config(model).vocab_size)
            yield workers

    def row(
        self,
        name: str,
        unit: str,
        workers: Mapping[str, Worker],
        measure: Callable[[Worker, int], float],
        bars: Sequence[Bar],
        token_bytes: int | None = None,
    ) -> Row:
        """Engines in turn, round by round; `measure(worker, round)` gives what is good when it is large.

        token_bytes: what a token reads of the weights, where a bar is about `READ`.
        """
        rounds, loads = [], []
        for i in range(1 + self.rounds):
            taken = {}
            if token_bytes is not None:
                taken[READ] = workers[OURS].ask("read", threads=self.threads) / token_bytes
            for engine, worker in workers.items():
                load = Load(worker)
                taken[engine] = measure(worker, i)
                loads.append(load.others_share())
            rounds.append(taken)
        return row_of(name, unit, rounds[1:], bars, statistics.median(loads))


def row_of(
    name: str, unit: str, rounds: Sequence[Mapping[str, float]], bars: Sequence[Bar], others: float
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
