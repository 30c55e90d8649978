"""Search the blockings of the matmuls for few rows on this machine's GPU, and write them to the package's table.

    python benchmarks/tune.py [--rows 1,2,4,8,16] [--bits 4,8] [--shapes 7b,nemo]

Each matrix of a layer is tried alone, in a graph of several layers so that no cache holds the weights; the best few of
each are then tried in whole decode steps, attention included, whose launches overlap. Compiling is most of the work, so
it is done first, in one process for each core.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from gpu_decode import STEPS, median_s, random_model
from shapes import MISTRAL_7B

from mistralcli.cache import KVCache
from mistralcli.decoder import Decoder
from quant.kernels.activations import TENSOR_CORE_ROWS, Activations, Rounding, packed
from quant.kernels.blockings import TABLE, Blocking, Kernel, key_of, read_table, tuned, write_table
from quant.kernels.matmul import ROUNDINGS
from quant.kernels.matvec import Epilogue, Weight, matvec
from quant.kernels.tiles import TILE_WORDS
from quant.schemes.affine import Affine

SHAPES = {
    "7b": {"dim": 4096, "hidden_dim": 14336, "q": 4096, "kv": 1024, "vocab_size": 32768},
    "nemo": {"dim": 5120, "hidden_dim": 14336, "q": 4096, "kv": 1024, "vocab_size": 131072},
}
N_LAYERS, N_BEST, ROUNDS = 8, 10, 2


@dataclass(frozen=True)
class Task:
    """One matrix: its place in the layer, its sizes, and what follows it."""

    place: str
    out_features: int
    in_features: int
    epilogue: Epilogue

    @property
    def n_rows_of_weight(self) -> int:
        return self.out_features * (2 if self.epilogue == "swiglu_and_pack" else 1)


def tasks(shape: dict[str, int]) -> list[Task]:
    dim, hidden_dim = shape["dim"], shape["hidden_dim"]
    return [
        Task("qkv", shape["q"] + 2 * shape["kv"], dim, "store"),
        Task("output", dim, shape["q"], "add_and_pack"),
        Task("gate_up", hidden_dim, dim, "swiglu_and_pack"),
        Task("down", dim, hidden_dim, "add_and_pack"),
        Task("head", shape["vocab_size"], dim, "store"),
    ]


class Chain:
    """The matmuls of some layers with random weights, and a head; or `only` one of these."""

    def __init__(
        self, shape: dict[str, int], bits: int, n_rows: int, n_layers: int, only: str | None = None
    ) -> None:
        self.tasks = [task for task in tasks(shape) if only in (None, task.place)]
        rounding = ROUNDINGS[bits]
        self.weights = {
            task.place: [random_weight(task, bits) for _ in range(1 if task.place == "head" else n_layers)]
            for task in self.tasks
        }
        self.inputs = {
            size: ready(n_rows, size, bits, rounding) for size in {t.in_features for t in tasks(shape)}
        }
        self.outputs = {
            task.place: torch.zeros(n_rows, task.out_features, device="cuda") for task in self.tasks
        }
        self.kernel: Kernel = "tiles" if self.inputs[shape["dim"]].rounding == "bfloat16" else "matvec"
        self.norm_weight = torch.ones(shape["dim"], device="cuda")
        self.counters = torch.zeros(shape["hidden_dim"] // 32, dtype=torch.int32, device="cuda")
        self.n_layers = n_layers

    def run(self, place: str, blocking: Blocking) -> None:
        """One matrix alone, of each layer."""
        task = next(task for task in self.tasks if task.place == place)
        for layer in range(self.n_layers):
            self.launch(task, self.weights[place][layer % len(self.weights[place])], blocking)

    def launch(self, task: Task, weight: Weight, blocking: Blocking) -> None:
        y = self.outputs[task.place]
        matvec(
            self.inputs[task.in_features],
            weight,
            y,
            epilogue=task.epilogue,
            norm_weight=self.norm_weight,
            next_x=None if task.epilogue == "store" else self.inputs[task.out_features],
            counters=self.counters,
            blocking=blocking,
            pdl=torch.cuda.get_device_capability() >= (9, 0),
        )

    def time_us(self, place: str, blocking: Blocking) -> float:
        """Microseconds of one matrix alone, the median of several graphs' replays."""
        return graph_us(lambda: self.run(place, blocking)) / self.n_layers


def random_weight(task: Task, bits: int) -> Weight:
    n_rows, width = task.n_rows_of_weight, task.in_features
    codes = torch.randint(0, 256, (n_rows, width * bits // 8), dtype=torch.uint8, device="cuda")
    n_groups = width // 128 if bits == 4 else 1
    scales = torch.rand(n_rows, n_groups, device="cuda").mul(width**-0.5 / 2**bits).bfloat16()
    return Weight.quantized(codes, scales, None, bits)


def ready(n_rows: int, width: int, bits: int, rounding: Rounding) -> Activations:
    made = packed(torch.randn(n_rows, width, device="cuda"), bits, rounding).before_norm(1e-5)
    assert made.square_sums is not None
    made.square_sums.fill_(32.0)
    return made


def graph_us(run: Callable[[], None], repeats: int = 9) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return float(sorted(times)[repeats // 2])


def candidates(task: Task, bits: int, n_rows: int) -> Iterator[Blocking]:
    """What is tried of the kernel that is used for so many rows."""
    return (tile_candidates if n_rows >= TENSOR_CORE_ROWS else matvec_candidates)(task, bits, n_rows)


def tile_candidates(task: Task, bits: int, n_rows: int) -> Iterator[Blocking]:
    """Blockings of `quant.kernels.tiles` that divide the weight, and whose registers are enough for eight warps."""
    n_tiles = task.in_features * bits // 32 // TILE_WORDS
    gated = 2 if task.epilogue == "swiglu_and_pack" else 1
    for outputs in (16 // gated, 32 // gated, 64 // gated):
        for warps in (2, 4, 8, 16):
            for depth in (1, 2, 3, 4):
                words_and_sums = outputs * gated // 16 * (8 * (depth + 1) + (4 if n_rows <= 8 else 8))
                fits = outputs <= 32 and words_and_sums <= (64 if warps == 16 else 96)
                if n_tiles % (warps * depth) == 0 and fits:
                    yield Blocking(outputs, warps * depth * TILE_WORDS, warps)


def matvec_candidates(task: Task, bits: int, n_rows: int) -> Iterator[Blocking]:
    """Blockings whose tiles divide the weight and give a thread 16 bytes or more of it, and not too many registers."""
    n_words = task.in_features * bits // 32
    gated = 2 if task.epilogue == "swiglu_and_pack" else 1
    for words in (64, 128, 256, 512, 1024):
        for warps in (1, 2, 4, 8, 16):
            for outputs in (1, 2, 4, 8, 16, 32):
                per_thread = outputs * gated * words // (32 * warps)
                fits = 4 <= per_thread <= 32 and per_thread * n_rows <= 128
                if (
                    n_words % words == 0
                    and n_words // words <= 32
                    and words * outputs >= 256 * warps
                    and fits
                ):
                    for ahead in (1, 2, 4):
                        if ahead == 1 or (
                            ahead <= n_words // words and per_thread * n_rows * (ahead + 1) <= 80
                        ):
                            yield Blocking(outputs, words, warps, ahead)


_chains: dict[tuple[str, int, int], Chain] = {}


def compile_one(job: tuple[str, int, int, str, Blocking]) -> str | None:
    """Compile one candidate in a process of its own; what failed, if it did."""
    shape, bits, n_rows, place, blocking = job
    try:
        key = (shape, bits, n_rows)
        if key not in _chains:
            _chains[key] = Chain(SHAPES[shape], bits, n_rows, 1)
        _chains[key].run(place, blocking)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  a candidate that cannot run is no candidate
        return f"{job}: {error!r}"[:200]
    return None


def tune(shape: str, bits: int, n_rows: int) -> dict[str, Blocking]:
    """The best blocking of each matrix, by its key in the table."""
    chain = Chain(SHAPES[shape], bits, n_rows, N_LAYERS)
    ranked: dict[str, list[Blocking]] = {}
    for task in chain.tasks:
        timed = []
        for blocking in candidates(task, bits, n_rows):
            try:
                timed.append((chain.time_us(task.place, blocking), blocking))
            except Exception:  # noqa: BLE001  as in compile_one
                continue
        timed.sort(key=lambda entry: entry[0])
        for us, blocking in timed[:3]:
            rate = chain.weights[task.place][0].size_bytes / us / 1e3
            print(f"  {task.place} alone: {us:.1f} µs, {rate:.0f} GB/s, {blocking}", flush=True)
        ranked[task.place] = [blocking for _, blocking in timed[:N_BEST]]
    keys = {task.place: key_of(chain.weights[task.place][0], n_rows, chain.kernel) for task in chain.tasks}
    del chain
    step = Step(SHAPES[shape], bits, n_rows)
    best = {keys[place]: found[0] for place, found in ranked.items()}
    now = {key: entry for key in best if (entry := step.table.get(key))}
    best_us = first_us = step.time_us(best)
    if len(now) == len(best) and (now_us := step.time_us(now)) < best_us:
        best, best_us = now, now_us
    for _ in range(ROUNDS):
        for place, found in ranked.items():
            for blocking in found:
                us = step.time_us(best | {keys[place]: blocking})
                if us < best_us * 0.998:
                    best, best_us = best | {keys[place]: blocking}, us
    print(
        f"{shape}, {bits} bits, {n_rows} rows: a step of {N_LAYERS} layers and the head {best_us:.1f} µs "
        f"({first_us:.1f} with the best of each alone); {best}",
        flush=True,
    )
    return best


class Step:
    """Whole decode steps of a few layers with random weights, in a short context."""

    def __init__(self, shape: dict[str, int], bits: int, n_rows: int) -> None:
        scheme = Affine(4, 128) if bits == 4 else Affine(8)
        self._config = replace(
            MISTRAL_7B,
            dim=shape["dim"],
            hidden_dim=shape["hidden_dim"],
            vocab_size=shape["vocab_size"],
            n_layers=N_LAYERS,
            sliding_windows=(None,) * N_LAYERS,
            max_seq_len=256,
        )
        self._model = random_model(self._config, scheme, scheme)
        self._n_seqs = n_rows
        self.table = tuned("{}.{}".format(*torch.cuda.get_device_capability()))

    def time_us(self, blockings: dict[str, Blocking]) -> float:
        """Microseconds of one step, the best of three medians: a card's clock wavers more than blockings differ."""
        self.table.update(blockings)
        cache = KVCache(
            self._config, max_seq_len=256, n_seqs=self._n_seqs, dtype=torch.bfloat16, device="cuda"
        )
        decoder = Decoder(self._model, cache)

        def run() -> None:
            cache.last.fill_(63)
            for _ in range(STEPS):
                decoder.step()

        return min(median_s(run) for _ in range(3)) / STEPS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--shapes", default="7b")
    options = parser.parse_args()
    runs = [
        (shape, int(bits), int(n_rows))
        for shape in options.shapes.split(",")
        for bits in options.bits.split(",")
        for n_rows in options.rows.split(",")
    ]
    jobs = [
        (shape, bits, n_rows, task.place, blocking)
        for shape, bits, n_rows in runs
        for task in tasks(SHAPES[shape])
        for blocking in candidates(task, bits, n_rows)
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        failed = [message for message in pool.map(compile_one, jobs, chunksize=1) if message]
    print(
        f"{torch.cuda.get_device_name()}: {len(jobs)} candidates, {len(failed)} cannot run {failed[:2]}",
        flush=True,
    )
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    for run in runs:
        table = read_table()
        table.setdefault(capability, {}).update(tune(*run))
        write_table(table)
    print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
