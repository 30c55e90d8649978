"""Memory for weights: tensors that lie one behind the other, and go when the last of a chunk goes."""

import gc
import mmap
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quant import huge_pages
from quant.huge_pages import Arena


def test_tensors_lie_one_behind_the_other_and_do_not_overlap() -> None:
    arena = Arena(chunk_bytes=4096)
    tensors = [arena.empty(n, dtype=torch.int32) for n in (3, 40, 1, 16)]
    starts = [tensor.data_ptr() - tensors[0].data_ptr() for tensor in tensors]
    assert starts == [0, 64, 256, 320]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]


def test_a_tensor_that_does_not_fit_begins_a_chunk_and_may_be_larger_than_one() -> None:
    arena = Arena(chunk_bytes=4096)
    small, large = arena.empty(4000, dtype=torch.uint8), arena.empty(100, 100, dtype=torch.float32)
    assert large.shape == (100, 100) and large.is_contiguous()
    large.fill_(1)
    small.fill_(2)
    assert large.sum() == 10_000 and small.sum() == 8_000


def test_nothing_takes_nothing() -> None:
    assert Arena().empty(0, 7, dtype=torch.float32).shape == (0, 7)


def test_a_chunk_is_given_back_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[weakref.ref[mmap.mmap]] = []

    def noted(size_bytes: int) -> mmap.mmap:
        memory = mmap.mmap(-1, size_bytes)
        chunks.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(huge_pages, "huge_pages", noted)
    arena = Arena(chunk_bytes=1024)
    first, second = (arena.empty(64, dtype=torch.uint8) for _ in "ab")
    del first
    gc.collect()
    assert len(chunks) == 1 and chunks[0]() is not None
    del second
    gc.collect()
    assert chunks[0]() is None
    arena.empty(64, dtype=torch.uint8)
    assert len(chunks) == 2


def test_threads_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is slow to come, so that without turns all threads would ask for one."""
    asked: list[int] = []

    def slow(size_bytes: int) -> mmap.mmap:
        asked.append(size_bytes)
        time.sleep(0.05)
        return mmap.mmap(-1, size_bytes)

    monkeypatch.setattr(huge_pages, "huge_pages", slow)
    arena = Arena(chunk_bytes=1 << 16)
    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda _: arena.empty(64, dtype=torch.uint8), range(500)))
    assert len({tensor.data_ptr() for tensor in tensors}) == 500 and len(asked) == 1


def test_memory_that_is_not_there_is_said() -> None:
    with pytest.raises(MemoryError, match="no memory for a buffer of"):
        Arena().empty(1 << 60, dtype=torch.uint8)
