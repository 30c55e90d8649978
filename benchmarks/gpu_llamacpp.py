"""Our GPU engine beside llama.cpp's, taking turns on one card: same codes and scales, whole tokens, greedy.

    CMAKE_ARGS=-DGGML_CUDA=on VENV/bin/pip install llama-cpp-python==0.3.36
    python benchmarks/gpu_llamacpp.py --llama-python VENV/bin/python [--where /dev/shm] [--layers 32] [--rounds 4]

Random weights in Mistral 7B's shapes, no window, in groups of 32 columns as llama.cpp has them (Q4_0, Q8_0), the head
int8; beside them our default, groups of 128. Each engine is a process that waits while another computes. A figure is
the median of the rounds, a ratio the median of the ratios within a round; beforehand both have to choose the same ids.
The directory of --where takes 16 GB meanwhile.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from cpu_vs_llamacpp import made
from peer_rows import Bar, random_ids, require_agreement, row_of
from random_build import write_build_of
from shapes import MISTRAL_7B
from worker_protocol import Worker, worker_command

from quant.schemes.affine import Affine

OURS, DEFAULT, LLAMA = "ours", "ours in groups of 128", "llama.cpp"
CTX = 8192 + 256
DECODED = 128


def decode_at(position: int) -> Callable[[Worker, int], float]:
    """Tokens a second behind a prompt that long."""

    def measure(worker: Worker, seed: int) -> float:
        ids = random_ids(position, seed, MISTRAL_7B.vocab_size)
        seconds = worker.ask("generate", ids=ids, n=1 + DECODED)["seconds"]
        return DECODED / float(seconds[-1] - seconds[0])

    return measure


def prefill_of(n_tokens: int) -> Callable[[Worker, int], float]:
    """Tokens a second of a prompt that long, up to the choice of the first id."""

    def measure(worker: Worker, seed: int) -> float:
        ids = random_ids(n_tokens, seed, MISTRAL_7B.vocab_size)
        return n_tokens / float(worker.ask("generate", ids=ids, n=1)["seconds"][0])

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument(
        "--where", type=Path, default=Path("/dev/shm"), help="a directory with room for 16 GB"
    )
    parser.add_argument("--layers", type=int, default=MISTRAL_7B.n_layers)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for bits in (4, 8):
        with tempfile.TemporaryDirectory(dir=options.where) as folder:
            compare(bits, Path(folder), options)


def compare(bits: int, folder: Path, options: argparse.Namespace) -> None:
    """Print the rows of int4 or int8."""
    config = replace(MISTRAL_7B, n_layers=options.layers)
    model = made(folder, f"int{bits}-g32", config, Affine(bits, 32), Affine(8, 32))
    llama = worker_command("llama", str(options.llama_python))
    with ExitStack() as stack:
        workers = {OURS: stack.enter_context(Worker(worker_command("ours")))}
        workers[OURS].ask("load", model=str(model), threads=1, ctx=CTX, device="cuda")
        workers[LLAMA] = stack.enter_context(Worker(llama))
        workers[LLAMA].ask("load", model=str(model / "model.gguf"), threads=1, ctx=CTX)
        require_agreement(workers, config.vocab_size)
        if bits == 4:
            default = write_build_of(config, folder / "int4-g128", Affine(4, 128), Affine(8, 128)).parent
            workers[DEFAULT] = stack.enter_context(Worker(worker_command("ours")))
            workers[DEFAULT].ask("load", model=str(default), threads=1, ctx=CTX, device="cuda")
        measures = {f"decode at {position}": decode_at(position) for position in (64, 8192)} | {
            f"pre-fill of {n_tokens}": prefill_of(n_tokens) for n_tokens in (512, 2048, 8192)
        }
        for what, measure in measures.items():
            rounds = [
                {name: measure(worker, seed) for name, worker in workers.items()}
                for seed in range(1 + options.rounds)
            ]
            bars = [Bar(name, LLAMA, 1.0) for name in workers if name != LLAMA]
            print(row_of(f"7B int{bits}, {what}", "tok/s", rounds[1:], bars), flush=True)


if __name__ == "__main__":
    main()
