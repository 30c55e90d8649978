"""A file that is being downloaded, and which of its bytes are here: both survive a killed process and a power cut.

The part file has its full size from the start, with holes where nothing has come yet. Beside it lies a journal: a
header, and two numbers for each piece of the file: how many of its bytes, from its start on, were written, and how many
are on the disk for certain. A write is noted only after it was made, so a killed process loses at most what it had
received and not yet written. What was written but not flushed lives in the kernel's memory: it outlives the process,
not the machine. So the header names the boot that the numbers were written in; after another one only flushed bytes
count. The hash of the whole file, checked at its end, is what the bytes are trusted for in any case.
"""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

from mistralcli.hub_cache import JOURNAL_SUFFIX

_VERSION = 1
_HEADER_BYTES = 512
_COUNTS = struct.Struct("<QQ")
_COUNT = struct.Struct("<Q")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LEAST_PIECE_BYTES, _LARGEST_PIECE_BYTES = 8 << 20, 64 << 20
_PIECES = 32
"""Of about so many pieces a file is made, within those sizes: enough to share out, few enough requests."""


def boot_id() -> str:
    """What names the time since the machine was started; where nothing does, no two calls give the same."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"unknown {time.time_ns()}"


def piece_size(size_bytes: int) -> int:
    """How large the pieces of a file are: a power of two."""
    wanted = min(max(size_bytes // _PIECES, _LEAST_PIECE_BYTES), _LARGEST_PIECE_BYTES)
    return int(1 << (wanted.bit_length() - 1))


class PartFile:
    """The part file at `path`, taken over as it is where its journal fits, else new and empty.

    Threads may write at the same time, each to places of its own; where two write the same bytes, nothing is lost.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.piece_bytes = piece_size(size_bytes)
        self._journal_path = path.with_name(path.name + JOURNAL_SUFFIX)
        known = self._read_journal()
        if known is None:
            self._journal_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        # Never closed by hand: a thread that is still at a read must not write into another file of the same number.
        self._file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0
        )
        self._journal = os.fdopen(
            os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0
        )
        os.ftruncate(self._file.fileno(), size_bytes)
        n_pieces = -(-size_bytes // self.piece_bytes)
        counts = [(0, 0)] * n_pieces if known is None else known
        self._written = [written for written, _ in counts]
        self._flushed = [flushed for _, flushed in counts]
        packed = b"".join(_COUNTS.pack(*pair) for pair in counts)
        os.pwrite(self._journal.fileno(), self._header() + packed, 0)

    def _header(self) -> bytes:
        fields = {"version": _VERSION, "size": self.size_bytes, "piece": self.piece_bytes, "boot": boot_id()}
        return json.dumps(fields).encode().ljust(_HEADER_BYTES)

    def _read_journal(self) -> list[tuple[int, int]] | None:
        """For each piece the bytes that are here, and those certain to be on the disk; None for no sound journal."""
        try:
            data = self._journal_path.read_bytes()
            header: dict[str, Any] = json.loads(data[:_HEADER_BYTES])
            described = (header["version"], header["size"], header["piece"])
            counts = [(written, flushed) for written, flushed in _COUNTS.iter_unpack(data[_HEADER_BYTES:])]
            is_whole = self.path.stat().st_size == self.size_bytes
            is_same_boot = header["boot"] == boot_id()
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None
        lengths = [self.length(index) for index in range(-(-self.size_bytes // self.piece_bytes))]
        if not is_whole or described != (_VERSION, self.size_bytes, self.piece_bytes):
            return None
        if len(counts) != len(lengths):
            return None
        if not all(f <= w <= length for (w, f), length in zip(counts, lengths, strict=True)):
            return None
        return counts if is_same_boot else [(flushed, flushed) for _, flushed in counts]

    def length(self, index: int) -> int:
        """The bytes of one piece."""
        return min(self.piece_bytes, self.size_bytes - index * self.piece_bytes)

    def gap(self, index: int) -> tuple[int, int]:
        """First byte that is missing from a piece, and the piece's end: equal where it is whole."""
        start = index * self.piece_bytes
        return start + self._written[index], start + self.length(index)

    def missing(self) -> list[int]:
        """The pieces that are not whole, in order."""
        return [index for index, n_bytes in enumerate(self._written) if n_bytes < self.length(index)]

    def is_empty(self, index: int) -> bool:
        """Whether nothing of a piece is here."""
        return not self._written[index]

    @property
    def received_bytes(self) -> int:
        return sum(self._written)

    @property
    def frontier(self) -> int:
        """How many bytes are here from the file's start on without a gap."""
        for index, n_bytes in enumerate(self._written):
            if n_bytes < self.length(index):
                return index * self.piece_bytes + n_bytes
        return self.size_bytes

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Take bytes that belong at `offset`: what is missing of them, as far as no gap would be left before it.

        Returns how many were taken.
        """
        view, end, n_taken = memoryview(data), offset + len(data), 0
        while offset < end:
            index = offset // self.piece_bytes
            first, piece_end = self.gap(index)
            stop = min(end, piece_end)
            if offset <= first < stop:
                self._put(first, view[first - offset : stop - offset])
                self._note(index, stop)
                n_taken += stop - first
            view, offset = view[stop - offset :], stop
        return n_taken

    def _put(self, offset: int, view: memoryview) -> None:
        while view:
            n_bytes = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[n_bytes:], offset + n_bytes

    def _note(self, index: int, stop: int) -> None:
        self._written[index] = stop - index * self.piece_bytes
        os.pwrite(self._journal.fileno(), _COUNT.pack(self._written[index]), self._place(index))

    @staticmethod
    def _place(index: int) -> int:
        return _HEADER_BYTES + index * _COUNTS.size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read bytes that are here; returns how many."""
        return os.preadv(self._file.fileno(), [buffer], offset)

    def flush(self) -> None:
        """Make sure of what is written so far: the bytes first, and only then the numbers that say so."""
        written = list(self._written)
        if written == self._flushed:
            return
        os.fsync(self._file.fileno())
        for index, n_bytes in enumerate(written):
            if n_bytes != self._flushed[index]:
                os.pwrite(self._journal.fileno(), _COUNT.pack(n_bytes), self._place(index) + _COUNT.size)
        os.fsync(self._journal.fileno())
        self._flushed = written

    def move_to(self, target: Path) -> None:
        """Give the whole file its name, so that a power cut leaves it whole or a part file; the journal goes."""
        os.fsync(self._file.fileno())
        self.path.replace(target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file and its journal: nothing of it is used again."""
        self._journal_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
