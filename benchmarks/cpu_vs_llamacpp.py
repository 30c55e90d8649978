"""Our CPU engine beside llama.cpp's, interleaved in one run: same weights, equal bits per weight, whole tokens.

    python benchmarks/cpu_vs_llamacpp.py --work DIRECTORY [--only 1b,7b,…] [--llama-python PATH] [--json FILE]

Makes random builds, writes the same codes and scales as GGUF (`gguf_build.py`), builds llama.cpp (`cpu_llama_build.py`)
and starts a process for each engine (`worker_*.py`). They take turns: a round is one measurement of each, and while
one computes the others wait for input. A figure is the median of its rounds, a ratio the median of the ratios within a
round. Beforehand all have to choose the same ids. Attention, norms and greedy sampling are in every figure.

    1b       decode and pre-fill of 512 tokens, int4 in groups of 32; there also under a cap of AVX2, and transformers
    7b       decode, int4 in groups of 32 and of 128, which llama.cpp has in groups of 32 too
    int8     decode, 1B in groups of 32
    memory   resident memory, 7B int4 with a window of 4,096 and 32,768 positions of context
    first    first token of a prompt of 2,000: SmolLM2 ($MISTRAL_SMOLLM2_DIR) in int4 and the demo, whose window
             llama.cpp does not know

DIRECTORY gets 15 GB, kept for the next run. Where other work is on the machine, give this one a raised priority: what
others took of the processors is shown.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cpu_engines import (
    OURS,
    OURS_AVX2,
    PATCHED,
    STOCK,
    STOCK_AVX2,
    TRANSFORMERS,
    Engines,
)
from cpu_llama_build import installed_python
from gguf_build import write_gguf
from peer_rows import READ, Bar, Row, random_ids, row_of
from random_build import write_build_of
from shapes import MISTRAL_1B, MISTRAL_7B
from worker_protocol import Worker

from mistralcli.config import ModelConfig
from mistralcli.demo import demo_directory
from mistralcli.weights import open_checkpoint
from quant.schemes.affine import Affine

VOCAB_SIZE = MISTRAL_7B.vocab_size
WINDOWED_7B = replace(MISTRAL_7B, sliding_windows=(4096,) * MISTRAL_7B.n_layers)
MEMORY_BAR = 5.5e9


def decode(worker: Worker, seed: int, n: int = 17) -> float:
    """Tokens a second behind a prompt of 64."""
    seconds = worker.ask("generate", ids=random_ids(64, seed, VOCAB_SIZE), n=n)["seconds"]
    return (n - 1) / float(seconds[-1] - seconds[0])


def decode_7b(worker: Worker, seed: int) -> float:
    return decode(worker, seed, n=9)


def prefill(worker: Worker, seed: int) -> float:
    """Tokens a second of a prompt of 512, up to the choice of the first id."""
    return 512 / float(worker.ask("generate", ids=random_ids(512, seed, VOCAB_SIZE), n=1)["seconds"][0])


def made(work: Path, name: str, config: ModelConfig, layers: Affine, head: Affine) -> Path:
    """A random build, and the same as `model.gguf` beside it."""
    folder = work / name
    if not (folder / "model.gguf").exists():
        write_build_of(config, folder, layers, head)
        with_gguf(folder)
    return folder


def with_gguf(folder: Path) -> None:
    write_gguf(folder, folder / "partial")
    (folder / "partial").rename(folder / "model.gguf")


def token_bytes(build: Path) -> int:
    """What a token reads of the weights: all but the embedding."""
    checkpoint = open_checkpoint(build)
    return sum(checkpoint.spec(name).nbytes for name in checkpoint.names() if "embed_tokens" not in name)


def one_billion(engines: Engines) -> Iterator[Row]:
    model = made(engines.work, "1b-int4-g32", MISTRAL_1B, Affine(4, 32), Affine(8, 32))
    names = (OURS, OURS_AVX2, STOCK, PATCHED, STOCK_AVX2, TRANSFORMERS)
    with engines.loaded(names, model, 2048) as workers:
        decoding = {name: workers[name] for name in (OURS, STOCK, PATCHED, TRANSFORMERS)}
        bars = [Bar(OURS, STOCK, 1.5), Bar(OURS, PATCHED, 1.0), Bar(OURS, READ, 0.75)]
        yield engines.row("1B int4 g32, decode", "tok/s", decoding, decode, bars, token_bytes(model))
        bars = [Bar(OURS, STOCK, 1.8), Bar(OURS_AVX2, STOCK_AVX2, 1.4)]
        filling = {name: worker for name, worker in workers.items() if name != PATCHED}
        yield engines.row("1B int4 g32, pre-fill of 512", "tok/s", filling, prefill, bars)


def seven_billion(engines: Engines) -> Iterator[Row]:
    for group_size in (32, 128):
        name = f"7b-int4-g{group_size}"
        model = made(engines.work, name, WINDOWED_7B, Affine(4, group_size), Affine(8, group_size))
        with engines.loaded((OURS, STOCK), model, 2048) as workers:
            bars = [Bar(OURS, STOCK, 1.6), Bar(OURS, READ, 0.75)]
            row = f"7B int4 g{group_size}, decode"
            yield engines.row(row, "tok/s", workers, decode_7b, bars, token_bytes(model))


def int8(engines: Engines) -> Iterator[Row]:
    model = made(engines.work, "1b-int8-g32", MISTRAL_1B, Affine(8, 32), Affine(8, 32))
    with engines.loaded((OURS, STOCK), model, 2048) as workers:
        bars = [Bar(OURS, STOCK, 1.3), Bar(OURS, READ, 0.75)]
        yield engines.row("1B int8 g32, decode", "tok/s", workers, decode, bars, token_bytes(model))


def memory(engines: Engines) -> Iterator[Row]:
    """One engine at a time, each with a chunk of 512 tokens behind it and the cache of a full context."""
    model = made(engines.work, "7b-int4-g128", WINDOWED_7B, Affine(4, 128), Affine(8, 128))
    peaks = {}
    for name in (OURS, STOCK):
        with engines.loaded((name,), model, 32768) as workers:
            workers[name].ask("fill")
            prefill(workers[name], 1)
            found = workers[name].ask("memory")
            peaks[name] = found["peak"]
            print(f"{name}: { ({key: f'{value / 1e9:.2f} GB' for key, value in found.items()}) }", flush=True)
    allowed = {name: MEMORY_BAR / peak for name, peak in peaks.items()} | {"limit of 5.5 GB": 1.0}
    bars = [Bar(OURS, "limit of 5.5 GB", 1.0)]
    yield row_of("7B int4 g128, 32k of context, 5.5 GB over the peak", "times", [allowed], bars, 0.0)


def first_token(engines: Engines) -> Iterator[Row]:
    def first(worker: Worker, seed: int) -> float:
        ids = random_ids(2000, seed, 4096)  # the demo's vocabulary
        return 1 / float(worker.ask("generate", ids=ids, n=1)["seconds"][0])

    for name, model in small_models(engines.work):
        with engines.loaded((OURS, STOCK), model, 2048) as workers:
            row = f"{name}, first token of a prompt of 2,000"
            yield engines.row(row, "1/s", workers, first, [Bar(OURS, STOCK, 1.0)])


def small_models(work: Path) -> Iterator[tuple[str, Path]]:
    demo = work / "demo"
    if not (demo / "model.gguf").exists():
        shutil.copytree(demo_directory(), demo, dirs_exist_ok=True)
        with_gguf(demo)
    yield "demo", demo
    source, smollm2 = os.environ.get("MISTRAL_SMOLLM2_DIR"), work / "smollm2-int4-g32"
    if source and not (smollm2 / "model.gguf").exists():
        command = [sys.executable, "-m", "mistralcli", "quantize", source, "--group-size", "32", "-q"]
        subprocess.run([*command, "--force", "-o", str(smollm2)], check=True)
        with_gguf(smollm2)
    if source:
        yield "SmolLM2-135M int4 g32", smollm2


SECTIONS = {
    "1b": one_billion,
    "7b": seven_billion,
    "int8": int8,
    "memory": memory,
    "first": first_token,
}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS), help="some of " + ", ".join(SECTIONS))
    parser.add_argument("--llama-python", type=Path, help="an interpreter that has llama-cpp-python already")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = [one for one in options.only if one not in SECTIONS]
    if unknown:
        parser.error(f"--only {','.join(unknown)} is not one of {', '.join(SECTIONS)}")
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    if options.llama_python is not None and not options.llama_python.exists():
        parser.error(f"--llama-python {options.llama_python} does not exist")
    return options


def as_json(row: Row) -> Mapping[str, object]:
    return asdict(row) | {"ratios": [asdict(bar) | {"ratio": ratio} for bar, ratio in row.ratios]}


def main() -> None:
    options = parsed()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = options.llama_python or installed_python(work)
    engines = Engines(work, python.absolute(), options.threads, options.rounds)
    rows = []
    for name in options.only:
        for row in SECTIONS[name](engines):
            print(row, flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([as_json(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
