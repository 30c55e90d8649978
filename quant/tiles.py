"""Work on a large matrix, a tile of rows at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_THREADS = 16
"""Bounds the memory that tiles take together, with 8 MB each."""

T = TypeVar("T")


def map_tiles(work: Callable[[slice], T], n_rows: int, tile_rows: int) -> list[T]:
    """`work` for each tile of `tile_rows` rows, in as many threads as torch computes with.

    Within a tile each operator runs in one thread. With an operator spread over threads they would wait for one
    another a hundred times a tile: on a machine busy with something else that took up to 20 times as long.
    """
    tiles = [slice(start, min(start + tile_rows, n_rows)) for start in range(0, n_rows, tile_rows)]
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
