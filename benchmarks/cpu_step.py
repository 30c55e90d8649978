"""Where a step of decoding on the CPU spends its time: kernel by kernel, and to choose the tokens.

    python benchmarks/cpu_step.py [MODEL ...] [--seqs 1 8] [--positions 100] [--threads N] [--rounds N]

MODEL: directories of builds; `demo` is the built-in one, `1b` a random int4 build in the shapes of a model of 1.0
billion weights. All jobs of a kernel in a step make a program of their own, which is run behind a whole step, so that
it finds caches about as the step does; what the program takes for no rows, which is to enter it, is taken off. Shown
are medians, and shares of their sum beside the whole step. With one thread it is that thread's processor time, which
other work on the machine does not add to.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program sets it

import torch
from random_build import HEAD, LAYERS, write_build_of
from shapes import MISTRAL_1B

from mistralcli import cpu_decoder
from mistralcli.demo import demo_directory
from mistralcli.engine import Engine
from mistralcli.kernels.cpu import attention, dense, pointwise
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.sampling import Sampler
from mistralcli.session import open_session
from quant.kernels.cpu import machine_code, matmul
from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.machine_code import Code
from quant.kernels.cpu.pool import Job
from quant.kernels.cpu.program import Program

Steps = Sequence[Sequence[Job]]


class Recorded(Program):
    """A program that can be taken apart."""

    def __init__(self, of_none: Steps, of_one: Steps) -> None:
        super().__init__(of_none, of_one)
        self.steps = of_none, of_one

    def by_kernel(self) -> dict[int, Program]:
        """A program of each kernel's jobs, by its address."""
        found: dict[int, tuple[list[list[Job]], list[list[Job]]]] = defaultdict(lambda: ([], []))
        for i, steps in enumerate(self.steps):
            for job in (job for step in steps for job in step):
                found[job.kernel][i].append([job])
        return {kernel: Program(*steps) for kernel, steps in found.items()}


@contextmanager
def named_kernels() -> Iterator[dict[int, str]]:
    """The names of kernels that are asked for meanwhile, by address; programs are `Recorded`."""
    names: dict[int, str] = {}
    compiled, original = machine_code.kernel, cpu_decoder.Program

    def remember(code: Callable[..., Code], *parameters: int | str) -> int:
        address = compiled(code, *parameters)
        names[address] = (
            f"{code.__module__.rpartition('.')[2]}.{code.__name__.strip('_').removesuffix('_kernel')}"
        )
        return address

    asking = (matmul, attention, dense, pointwise)
    for module in asking:
        vars(module)["kernel"] = remember
    vars(cpu_decoder)["Program"] = Recorded
    try:
        yield names
    finally:
        for module in asking:
            vars(module)["kernel"] = compiled
        vars(cpu_decoder)["Program"] = original


class Clock:
    """Medians of what is run behind a step."""

    def __init__(self, step: Callable[[], object], n_threads: int, n_rounds: int) -> None:
        self._step, self._n_rounds = step, n_rounds
        self._now = time.thread_time if n_threads == 1 else time.perf_counter

    def seconds(self, run: Callable[[], object]) -> float:
        taken = []
        for _ in range(self._n_rounds):
            self._step()
            started = self._now()
            run()
            taken.append(self._now() - started)
        return statistics.median(taken)


def filled(directory: Path, n_seqs: int, n_positions: int, n_threads: int) -> Engine:
    """An engine whose sequences have so many positions."""
    options = SessionOptions(ctx=n_positions + 8, device="cpu", n_seqs=n_seqs, threads=n_threads)
    engine = open_session(directory, options).engine
    engine.start({index: [5 + index] * n_positions for index in range(n_seqs)})
    return engine


def measure(
    directory: Path, n_seqs: int, n_positions: int, n_threads: int, n_rounds: int, names: dict[int, str]
) -> None:
    """Print a table."""
    engine = filled(directory, n_seqs, n_positions, n_threads)

    def step() -> torch.Tensor:
        engine.cache.last.fill_(n_positions - 1)
        return engine.step([7] * n_seqs)

    clock = Clock(step, n_threads, n_rounds)
    whole, logits = clock.seconds(step), step()
    decoder = engine._cpu_decoder
    assert decoder is not None and isinstance(decoder._step, Recorded)
    taken: dict[str, float] = defaultdict(float)  # a function is several kernels: of int4, of int8
    for kernel, program in decoder._step.by_kernel().items():
        run, enter = (partial(program.run, n_threads, n_rows) for n_rows in (n_seqs, 0))
        taken[names[kernel]] += clock.seconds(run) - clock.seconds(enter)
    samplers = [
        Sampler(SamplingParams(seed=i)) for i in range(n_seqs)
    ]  # at the temperature that is the default
    rows = list(logits)
    taken["choosing tokens"] = clock.seconds(
        lambda: [choose(row, []) for choose, row in zip(samplers, rows, strict=True)]
    )
    total = sum(taken.values())
    print(
        f"\n{directory.name}: {n_seqs} sequences of {n_positions} positions; whole step {whole * 1e3:.2f} ms"
    )
    for name, one in sorted(taken.items(), key=lambda pair: -pair[1]):
        print(f"  {name:20} {one * 1e3:8.3f} ms {one / total:6.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["demo", "1b"])
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--positions", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(f"{chosen().name}, {arguments.threads} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder, named_kernels() as names:
        for model in arguments.models:
            directory = demo_directory() if model == "demo" else Path(model)
            if model == "1b":
                directory = Path(folder) / "1b"
                write_build_of(MISTRAL_1B, directory, LAYERS, HEAD)
            for n_seqs in arguments.seqs:
                measure(directory, n_seqs, arguments.positions, arguments.threads, arguments.rounds, names)


if __name__ == "__main__":
    main()
