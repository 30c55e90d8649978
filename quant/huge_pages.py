"""Memory in huge pages, where the system has them: it gives them faster, and reads through them faster.

A processor keeps the places of some thousand pages at hand. Weights of 4 GB have a million small ones; in huge pages,
of 2 MB, two cores of an EPYC read a quarter to a half more of them in a second (`docs/log.md`). Linux gives them to who
asks for them, in a region that nobody else has pages of.
"""

import math
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch

CHUNK_BYTES = 256 << 20
"""Asked for at once. What is not written of it takes no memory (on Windows, none but a promise of it)."""

_ALIGNMENT = 64
"""Of a cache line."""


def huge_pages(size_bytes: int) -> mmap.mmap:
    """That many bytes of zeros, in huge pages as far as there are any.

    Raises:
        MemoryError: there is no such memory.
    """
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:  # Windows
            memory = mmap.mmap(-1, size_bytes)
    except OSError as error:
        raise MemoryError(f"no memory for a buffer of {size_bytes} bytes") from error
    with suppress(OSError, AttributeError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Arena:
    """Gives tensors one behind the other, so that small ones are in huge pages too, and what is read in turn in turn.

    Their memory goes, a chunk at a time, with the last of its tensors.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None
        self._used_bytes = 0
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, of zeros as it happens.

        Raises:
            MemoryError: there is no memory for it.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        n_bytes = count * dtype.itemsize
        with self._lock:
            chunk = self._chunk()
            if chunk is None or self._used_bytes + n_bytes > len(chunk):
                chunk, self._used_bytes = huge_pages(max(n_bytes, self._chunk_bytes)), 0
                self._chunk = weakref.ref(chunk)
            offset = self._used_bytes
            self._used_bytes += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return torch.frombuffer(chunk, dtype=dtype, count=count, offset=offset).view(shape)
