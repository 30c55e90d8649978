"""Speed of the CPU's int4 and int8 matmuls, against what this machine reads and against the float32 reference.

    python benchmarks/cpu_matmul.py [--threads N] [--rounds N]

For each shape, copies of a weight take turns, so that none is in a cache when it is read. A round is a plain read of as
many bytes as the weight has, our product of one row, and the reference's, one directly after the other, so that all
meet the same load of the machine. Shown are medians: of our GB/s of weights, of the ratio to the read of the same
round, and of the ratio of the reference's time to ours; then GFLOP/s for 512 rows. `MISTRAL_CLI_CPU=avx2` caps the
instructions.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program sets it

import torch

from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.layout import Interleaved, interleave
from quant.kernels.cpu.matmul import interleaved_matmul
from quant.ops import int4_matmul, int8_matmul

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
SCHEMES = ((4, 32), (4, 128), (8, None))
CYCLED_BYTES = 1 << 30
"""Copies of a weight together: more than the last cache of any machine that we know, 480 MB."""

MANY_ROWS, MANY_ROUNDS = 512, 5


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """qweight and scales of random codes."""
    qweight = torch.randint(0, 256, (out_features, in_features * bits // 8), dtype=torch.uint8)
    scales = torch.rand(out_features, in_features // (group_size or in_features)).mul(0.01).bfloat16()
    return qweight, scales


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_row(
    weights: list[Interleaved], reference: Callable[[torch.Tensor], object], n_rounds: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of a plain read of the same size, of our product and of the reference's, round by round."""
    x = torch.randn(1, weights[0].in_features)
    flat = torch.ones(len(weights), weights[0].words.numel())  # float32, whose sum torch vectorizes
    for at in range(len(weights)):
        flat[at].sum(), interleaved_matmul(x, weights[at])
    reads, ours, references = [], [], []
    for i in range(n_rounds):
        at = i % len(weights)
        reads.append(seconds(flat[at].sum))
        ours.append(seconds(lambda at=at: interleaved_matmul(x, weights[at])))  # type: ignore[misc]
        if i % 8 == 0:
            references.append(seconds(lambda: reference(x)))
    return reads, ours, references


def measure(bits: int, group_size: int | None, shape: tuple[int, int], n_rounds: int) -> str:
    """A line of the table."""
    qweight, scales = random_weight(*shape, bits, group_size)
    matmul = int4_matmul if bits == 4 else int8_matmul
    made = interleave(qweight, scales, None, shape[1], bits)
    assert made is not None
    copies = max(2, CYCLED_BYTES // made.size_bytes // 2)
    weights = [made, *(replaced(made) for _ in range(copies - 1))]
    reads, ours, references = one_row(weights, lambda x: matmul.reference(x, qweight, scales, None), n_rounds)
    share = statistics.median(read / our for read, our in zip(reads, ours, strict=True))
    gb_s = made.size_bytes / statistics.median(ours) / 1e9
    read_gb_s = made.size_bytes / statistics.median(reads) / 1e9
    faster = statistics.median(references) / statistics.median(ours)
    x = torch.randn(MANY_ROWS, shape[1])
    times = [seconds(lambda i=i: interleaved_matmul(x, weights[i % copies])) for i in range(MANY_ROUNDS)]  # type: ignore[misc]
    theirs = seconds(lambda: matmul.reference(x, qweight, scales, None))
    gflops = [2 * MANY_ROWS * shape[0] * shape[1] / s / 1e9 for s in (statistics.median(times), theirs)]
    name = f"int{bits}" + (f" g{group_size}" if group_size else "")
    return (
        f"{name:10} {shape[0]:5}x{shape[1]:<5} {gb_s:6.1f} GB/s {read_gb_s:6.1f} read {share:6.0%}"
        f" {faster:6.1f}x {gflops[0]:8.0f} GFLOP/s {gflops[1]:6.0f} reference"
    )


def replaced(weight: Interleaved) -> Interleaved:
    """The same weight in memory of its own."""
    return replace(weight, words=weight.words.clone())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{chosen().name}, {arguments.threads} threads, torch {torch.__version__}")
    for bits, group_size in SCHEMES:
        for shape in SHAPES:
            print(measure(bits, group_size, shape, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
