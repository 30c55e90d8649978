"""Engines that take turns on a CPU: the processes of `cpu_vs_llamacpp.py`."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpu_llama_build import library_folder
from peer_rows import READ, Bar, Row, require_agreement, row_of
from worker_protocol import Load, Worker, worker_command

from mistralcli.config import read_config

OURS, OURS_AVX2, TRANSFORMERS = "ours", "ours AVX2", "transformers bf16"
STOCK, PATCHED, STOCK_AVX2 = "llama.cpp", "llama.cpp with prefetch", "llama.cpp AVX2"
LIBRARIES = {STOCK: "stock", PATCHED: "prefetch", STOCK_AVX2: "avx2"}


@dataclass(frozen=True)
class Engines:
    """How engines are started. work: the folder of builds and libraries."""

    work: Path
    llama_python: Path
    threads: int
    rounds: int

    def start(self, name: str) -> Worker:
        """The process of an engine, before it has a model."""
        if name in LIBRARIES:
            library = library_folder(self.work, LIBRARIES[name]).resolve()
            command = worker_command("llama", str(self.llama_python))
            return Worker(command, {"LD_LIBRARY_PATH": str(library)})
        cap = {"MISTRAL_CLI_CPU": "avx2"} if name == OURS_AVX2 else {}
        return Worker(worker_command("transformers" if name == TRANSFORMERS else "ours"), cap)

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
