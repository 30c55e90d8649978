"""The matmuls of a 7B layer for several rows on this machine's GPU: tensor cores against the matvec.

    python benchmarks/gpu_rows.py [--bits 4] [--rows 2,3,4,8,16]

For each number of rows and each matrix: the error of both kernels against float32, what they take with the blockings
of the package's table, in chains of eight layers that no cache holds, and the bandwidth that this is of the weights.
"""

import argparse
import multiprocessing
import os
from dataclasses import dataclass
from unittest import mock

import torch
from tune import N_LAYERS, SHAPES, Chain, Task, tasks

from quant import ops
from quant.kernels import activations
from quant.kernels.activations import packed
from quant.kernels.blockings import blocking_for
from quant.kernels.matmul import ROUNDINGS
from quant.kernels.matvec import Weight, matvec

FIRST_ROWS = {"tiles": 1, "matvec": 17}
"""From how many rows on tensor cores are used, to time one or the other kernel."""


@dataclass(frozen=True)
class Timing:
    """One kernel and one matrix: relative error of the product in norm, and what one launch takes."""

    error: float
    us: float
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.us:7.1f} µs {self.size_bytes / self.us / 1e3:5.0f} GB/s (error {self.error:.1e})"


def error_of(weight: Weight, bits: int, n_rows: int) -> float:
    """Of the first outputs of a product, against float32."""
    part = Weight(weight.words[:1024], weight.scales[:1024], None, bits)
    x = torch.randn(n_rows, part.in_features, device="cuda")
    y = torch.full((n_rows, part.out_features), torch.nan, device="cuda")
    matvec(packed(x, bits, ROUNDINGS[bits]), part, y)
    dense = ops.dequantize(part.words.view(torch.uint8), part.scales, None, part.in_features, bits)
    expected = x.double() @ dense.double().T
    return float((y.double() - expected).norm() / expected.norm())


def timing(kernel: str, bits: int, n_rows: int, task: Task, n_layers: int) -> Timing:
    with mock.patch.object(activations, "TENSOR_CORE_ROWS", FIRST_ROWS[kernel]):
        chain = Chain(SHAPES["7b"], bits, n_rows, n_layers, only=task.place)
        weight = chain.weights[task.place][0]
        blocking = blocking_for(weight, n_rows, torch.cuda.get_device_capability(), chain.kernel)
        error = error_of(weight, bits, n_rows)
        return Timing(error, chain.time_us(task.place, blocking), weight.size_bytes)


def compile_one(job: tuple[str, int, int, Task]) -> None:
    timing(*job, n_layers=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--rows", default="2,3,4,8,16")
    options = parser.parse_args()
    jobs = [
        (kernel, int(bits), int(n_rows), task)
        for bits in options.bits.split(",")
        for n_rows in options.rows.split(",")
        for task in tasks(SHAPES["7b"])
        for kernel in FIRST_ROWS
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(compile_one, jobs, chunksize=1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    layer_us: dict[tuple[str, int, int], float] = {}
    for kernel, bits, n_rows, task in jobs:
        one = timing(kernel, bits, n_rows, task, N_LAYERS)
        print(f"int{bits} {n_rows:2} rows {task.place:8} {kernel:6}: {one}", flush=True)
        if task.place != "head":
            key = (kernel, bits, n_rows)
            layer_us[key] = layer_us.get(key, 0.0) + one.us
    for (kernel, bits, n_rows), us in layer_us.items():
        print(f"int{bits} {n_rows:2} rows {kernel:6}: {us:.1f} µs a layer, each matrix alone")


if __name__ == "__main__":
    main()
