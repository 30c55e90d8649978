"""Measured memory bandwidth, and the speed that it allows: each token of an answer reads all weights once."""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from mistralcli.doctor.cuda import usable_devices
from mistralcli.doctor.findings import Context, Finding, guarded

if TYPE_CHECKING:
    import torch

_READ_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}
"""Larger than the last-level cache of nearly every machine."""
_N_READS = 8

_LAYER_WEIGHTS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
_HEAD_WEIGHTS = 32768 * 4096
TOKEN_BYTES_7B = (_LAYER_WEIGHTS * (4 + 16 / 128) + _HEAD_WEIGHTS * 8) / 8
"""What one token of Mistral 7B reads from an int4 build, 3.73 GB: 4 bits a weight and a 16-bit scale for each 128 in
the layers, 8 bits in the head. The embedding's one row, the norms and the head's scales are less than 0.02 %."""


def check_bandwidth(context: Context) -> Iterator[Finding]:
    for device in usable_devices():
        name = f"bandwidth ({device})"
        measure = _describe_cpu if device.type == "cpu" else partial(_describe_cuda, device)
        yield from guarded(name, partial(_measured, name, measure))


def _measured(name: str, measure: Callable[[], tuple[float, str]]) -> Iterator[Finding]:
    bandwidth, description = measure()
    tokens = f"{bandwidth / TOKEN_BYTES_7B:.3g} tokens/s of a 7B model in int4"
    yield Finding(name, "ok", f"{description}: at most {tokens} ({TOKEN_BYTES_7B / 1e9:.2f} GB a token)")


def _describe_cpu() -> tuple[float, str]:
    import torch

    n_threads = torch.get_num_threads()
    data = data_to_read(torch.device("cpu"))
    one, all_of_them = cpu_bandwidth(data, 1), cpu_bandwidth(data, n_threads)
    threads = f"{n_threads} threads, {one / 1e9:.1f} with one" if n_threads > 1 else "one thread"
    return all_of_them, f"{all_of_them / 1e9:.1f} GB/s with {threads}"


def _describe_cuda(device: "torch.device") -> tuple[float, str]:
    bandwidth = cuda_bandwidth(data_to_read(device))
    return bandwidth, f"{bandwidth / 1e9:.0f} GB/s"


def data_to_read(device: "torch.device", limit_bytes: int | None = None) -> "torch.Tensor":
    """Integers to measure with, a quarter at most of the memory that is free, or that a limit on the process leaves."""
    import torch

    from mistralcli.device import room_bytes
    from quant.huge_pages import Arena

    wanted = _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    n_values = min(wanted, room_bytes(device, limit_bytes) // 4) // torch.int64.itemsize
    if device.type != "cpu":
        return torch.ones(n_values, dtype=torch.int64, device=device)
    return Arena().empty(n_values, dtype=torch.int64).fill_(1)  # in huge pages, as weights are


def cpu_bandwidth(data: "torch.Tensor", n_threads: int) -> float:
    """Bytes a second that so many threads read, the best of several readings of `data`."""
    import torch

    n_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        return data.nbytes / min(_seconds(data) for _ in range(_N_READS))
    finally:
        torch.set_num_threads(n_before)


def _seconds(data: "torch.Tensor") -> float:
    started = time.perf_counter()
    data.sum()
    return time.perf_counter() - started


def cuda_bandwidth(data: "torch.Tensor") -> float:
    """Bytes a second that the device of `data` reads, the best of several readings by its own clock."""
    import torch

    with torch.cuda.device(data.device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_N_READS + 1)]
        for event in events:
            event.record()
            data.sum()
        torch.cuda.synchronize()
    milliseconds: list[float] = [one.elapsed_time(other) for one, other in itertools.pairwise(events)]
    return data.nbytes / min(milliseconds) * 1e3
