"""How fast a build gets from a file to this machine's GPU, beside what the file system and the bus allow.

    python benchmarks/load_speed.py [--where /dev/shm] [--layers 32] [--cold]

One run, medians of repeats: reading the file into pinned memory by 1 to 16 threads, copying pinned memory to the
device, loading the model, and loading it by memory map and `.to(device)`. The bound is the slower of the fastest
reading and the copying. --cold drops the file from the page cache before each reading (of no effect on tmpfs).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from random_build import write_build

from mistralcli import weights
from mistralcli.staged_reading import BUFFER_BYTES, N_BUFFERS

REPEATS = 5
BUS_BYTES = 256 << 20


def median_s(run: Callable[[], object], before: Callable[[], None]) -> float:
    """Median of the seconds of `run` and of what it queued, after one that does not count."""
    times = []
    for _ in range(1 + REPEATS):
        before()
        torch.cuda.empty_cache()  # a user's first load has to ask the driver for memory too
        torch.cuda.synchronize()
        started = time.perf_counter()
        kept = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        del kept
    return statistics.median(times[1:])


def read_file(path: Path, buffers: list[memoryview]) -> None:
    """Read all of a file, as many threads as buffers, each into its own."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)

    def read(i: int) -> None:
        for start in range(i * BUFFER_BYTES, size, len(buffers) * BUFFER_BYTES):
            stop = min(start + BUFFER_BYTES, size)
            view = buffers[i][: stop - start]
            while view:
                view = view[os.preadv(descriptor, [view], stop - len(view)) :]

    with ThreadPoolExecutor(len(buffers)) as pool:
        list(pool.map(read, range(len(buffers))))
    os.close(descriptor)


def bus_bytes_per_s() -> float:
    host = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(BUS_BYTES, dtype=torch.uint8, device="cuda")
    return BUS_BYTES / median_s(lambda: device.copy_(host, non_blocking=True), lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--where", type=Path, default=Path("/dev/shm"), help="a directory with room for 4 GB")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.where) as folder:
        path = write_build(Path(folder), options.layers)
        measure(path, options.cold)


def measure(path: Path, cold: bool) -> None:
    size = path.stat().st_size

    def forget() -> None:
        if cold:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def speed(run: Callable[[], object]) -> float:
        return size / median_s(run, forget)

    def load() -> object:
        return weights.load_model(path.parent, device=torch.device("cuda"), dtype=torch.bfloat16)

    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}; {size / 1e9:.2f} GB in "
        f"{path.parent}, {'dropped from the page cache each time' if cold else 'in the page cache'}",
        flush=True,
    )
    fastest = 0.0
    for n_threads in (1, 4, 8, 16):
        buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(n_threads)]
        views = [buffer.numpy().data for buffer in buffers]
        read = speed(lambda views=views: read_file(path, views))  # type: ignore[misc]
        fastest = max(fastest, read)
        print(f"file to pinned memory, {n_threads} threads: {read / 1e9:.2f} GB/s", flush=True)
    bus = bus_bytes_per_s()
    bound = min(fastest, bus)
    print(
        f"pinned memory to the device: {bus / 1e9:.2f} GB/s; so the bound is {bound / 1e9:.2f} GB/s",
        flush=True,
    )
    torch.cuda.reset_peak_memory_stats()
    ours = speed(load)
    print(
        f"load_model, {N_BUFFERS} buffers of {BUFFER_BYTES >> 20} MiB: {ours / 1e9:.2f} GB/s = {ours / bound:.0%} of "
        f"the bound, {size / ours:.2f} s, peak {torch.cuda.max_memory_allocated() / size - 1:+.1%} of the file's size",
        flush=True,
    )
    weights._staging = weights._mapping
    old = speed(load)
    print(f"by memory map and .to: {old / 1e9:.2f} GB/s = {old / bound:.0%}, {size / old:.2f} s", flush=True)


if __name__ == "__main__":
    main()
