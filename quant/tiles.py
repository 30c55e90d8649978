"""Work on a large matrix, a tile of rows at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_THREADS = 16
"""Bounds the memory that tiles take together, with 8 MB each."""

TILES_ON_GPU = 32
"""Tiles that a GPU takes as one: 64 MB of float32 for 2 MB here. On it a tile costs its launches, some hundred; with
the CPU's tiles and threads that was most of a build's time."""

T = TypeVar("T")


def map_tiles(
    work: Callable[[slice], T], n_rows: int, tile_rows: int, device: torch.device | None = None
) -> list[T]:
    """`work` for each tile of `tile_rows` rows, in as many threads as torch computes with.

    device: where the work is done, the CPU without it. On a GPU tiles are larger, and come one after the other.

    Within a tile each operator runs in one thread. With an operator spread over threads they would wait for one
    another a hundred times a tile: on a machine busy with something else that took up to 20 times as long.
    """
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        tile_rows *= TILES_ON_GPU
    tiles = [slice(start, min(start + tile_rows, n_rows)) for start in range(0, n_rows, tile_rows)]
    if on_gpu:
        return [work(tile) for tile in tiles]
    n_threads, inference_mode = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def work_alone(tile: slice) -> T:
        with torch.inference_mode(inference_mode):  # a mode is a thread's own
            return work(tile)

    torch.set_num_threads(1)  # threads that are made from here on take this over
    try:
        with ThreadPoolExecutor(min(n_threads, MAX_THREADS)) as pool:
            return list(pool.map(work_alone, tiles))
    finally:
        torch.set_num_threads(n_threads)
