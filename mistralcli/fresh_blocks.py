"""Blocks of a file that have just come, kept in memory until its hash is at them: it need not read them back."""

import threading
from dataclasses import dataclass

BLOCK_BYTES = 1 << 20
_WINDOW_BYTES = 32 << 20
"""So far ahead of the hash they are kept; what comes farther ahead is read back from the disk, or from the kernel."""


@dataclass(frozen=True)
class Block:
    """The first `n_bytes` of a buffer."""

    buffer: memoryview
    n_bytes: int


class FreshBlocks:
    """Whoever fills a block gives it; the one who hashes takes them in the order of the file. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, Block] = {}
        self._spare: list[memoryview] = []
        self._position = 0

    def buffer(self) -> memoryview:
        """A buffer of `BLOCK_BYTES` to fill: one that was used before, whose pages are there."""
        with self._lock:
            return self._spare.pop() if self._spare else memoryview(bytearray(BLOCK_BYTES))

    def give(self, start: int, block: Block) -> None:
        """Keep what belongs at `start` of the file, if the hash is not past it and not far from it."""
        with self._lock:
            if start not in self._kept and 0 <= start - self._position < _WINDOW_BYTES:
                self._kept[start] = block
            else:
                self._spare.append(block.buffer)

    def has(self, position: int) -> bool:
        with self._lock:
            return position in self._kept

    def take(self, position: int, end: int) -> tuple[Block | None, int]:
        """The block at `position`, and its end; else None, and up to where none is: no farther than `end`."""
        with self._lock:
            block = self._kept.pop(position, None)
            self._position = min([end, *self._kept]) if block is None else position + block.n_bytes
            return block, self._position

    def spare(self, buffer: memoryview) -> None:
        """Give a buffer back."""
        with self._lock:
            self._spare.append(buffer)
