"""Tensors of safetensors files to a GPU: through a few pinned buffers, read ahead while the bus copies.

Copying from a memory map stops at every page that is not mapped yet, and the driver copies once more, from pageable
into pinned memory. Here threads read pieces of the files into pinned buffers, in the order in which the tensors are
asked for, and each piece is on its way to the device as soon as it is there. Beside the tensors that takes the buffers.

A piece is a buffer full, whatever tensors it is of: a model has more small ones than pieces, and what a piece costs
beside its bytes, two threads' taking turns, would be most of the time.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mistralcli.errors import IntegrityError
from quant.tensors import TensorSpec

N_BUFFERS = 16
"""As many threads read: from the page cache one gives a quarter to an eighth of what a PCIe 5 bus takes."""
BUFFER_BYTES = 8 << 20
"""Large enough that a copy's start-up is nothing beside it, and small, so that the first is soon full."""
_GAP_BYTES = 4096
"""So many bytes that nobody asked for are read with those around them."""


@dataclass(frozen=True)
class TensorPlace:
    """A stored tensor: its name, and where its bytes begin in which file."""

    name: str
    path: Path
    start: int
    spec: TensorSpec

    @property
    def stop(self) -> int:
        return self.start + self.spec.nbytes


@dataclass(frozen=True)
class _Piece:
    """Bytes `start` … `stop` of a file."""

    path: Path
    start: int
    stop: int


class _UnreadError(Exception):
    """Byte `at` of a file cannot be read; the cause says why."""

    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path, at)
        self.path = path
        self.at = at


class _Buffer:
    """Memory that is filled from a file, and free again when the device has copied it.

    Pinned where that is possible; from pageable memory the driver copies by itself, before `copy_to` returns.
    The thread that fills it asks for it: pinning all buffers takes half as long as reading 4 GB, and those that are
    pinned are filled meanwhile.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._size_bytes = size_bytes
        self._device = device
        self._bytes, self._view = torch.empty(0, dtype=torch.uint8), memoryview(b"")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def make(self) -> None:
        """Ask for the memory, the first time; where there is none, filling it says so."""
        if not self._view:
            with suppress(MemoryError, RuntimeError):
                self._bytes = _host_memory(self._size_bytes, self._device)
                self._view = self._bytes.numpy().data

    def fill(self, piece: _Piece, descriptor: int) -> None:
        """Read a piece, by a thread: neither the wait nor the reading holds Python's lock."""
        self.wait()
        if not self._view:
            raise MemoryError(f"no memory for a buffer of {self._size_bytes} bytes")
        view = self._view[: piece.stop - piece.start]
        while view:
            at = piece.stop - len(view)
            try:
                n_read = os.preadv(descriptor, [view], at)
            except OSError as error:
                raise _UnreadError(piece.path, at) from error
            if n_read == 0:
                raise _UnreadError(piece.path, at) from EOFError(f"it ends at byte {at}")
            view = view[n_read:]

    def copy_to(self, target: torch.Tensor, start: int, stop: int) -> None:
        """Copy bytes `start` … `stop` to `target` (n_bytes,), on the current stream, without a wait."""
        target.copy_(self._bytes[start:stop], non_blocking=True)

    def release(self) -> None:
        """All copies are queued: what waits for the buffer from now on waits for them."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Until the device has copied it. An event that was never recorded is over."""
        if self._copied is not None:
            self._copied.synchronize()


def unreadable(path: Path, name: str, error: Exception) -> IntegrityError:
    """The error for a tensor that a file does not give."""
    return IntegrityError(
        f"{path} cannot be read for tensor {name}: {error}",
        "the file is damaged or incomplete: pull the model again",
    )


def data_offsets(path: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a safetensors file that the library has opened, which checks its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def read_to_device(
    places: Sequence[TensorPlace],
    device: torch.device,
    *,
    n_buffers: int = N_BUFFERS,
    buffer_bytes: int = BUFFER_BYTES,
) -> Generator[torch.Tensor, None, None]:
    """Yield the tensors in that order, each on `device` in the type that it is stored in.

    Their copies are queued on the current stream: what is queued there later finds them whole, and the memory of a
    tensor that was dropped is written only after what was queued to read it. So they need no stream of their own.

    Raises:
        IntegrityError: a file cannot be read, or ends too early; the tensor is named.
    """
    try:
        yield from _read(places, device, n_buffers, buffer_bytes)
    finally:
        if device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()  # torch would keep the pinned memory


def _read(
    places: Sequence[TensorPlace], device: torch.device, n_buffers: int, buffer_bytes: int
) -> Iterator[torch.Tensor]:
    with ExitStack() as stack:
        descriptors = _open_all(places, stack)
        pipeline = stack.enter_context(_Pipeline(_pieces(places, buffer_bytes), descriptors))
        pipeline.start([_Buffer(buffer_bytes, device) for _ in range(n_buffers)])
        for place in places:
            data = torch.empty(place.spec.nbytes, dtype=torch.uint8, device=device)
            try:
                pipeline.copy_to(data, place)
            except _UnreadError as failure:
                behind = [one for one in places if one.path == failure.path and one.stop > failure.at]
                cause = failure.__cause__
                assert isinstance(cause, Exception)
                name = min(behind, key=lambda one: one.start).name
                raise unreadable(failure.path, name, cause) from failure
            yield data.view(place.spec.dtype).view(place.spec.shape)
            del data  # else it would live until the next has its memory


class _Reader:
    """A thread that reads pieces into a buffer of its own, one whenever the one before it is let go of."""

    def __init__(self, buffer: _Buffer, read_next: Callable[["_Reader"], bool]) -> None:
        """read_next: reads the next piece into the reader's buffer; false where there is none."""
        self.buffer = buffer
        self._read_next = read_next
        self._free = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="read weights", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """All copies out of the buffer are queued: read the next piece."""
        self.buffer.release()
        self._free.release()

    def join(self) -> None:
        """Wait for the end of the thread, and for the device to have copied the buffer; there is nothing to read."""
        if self._free.locked():
            self._free.release()
        self._thread.join()
        self.buffer.wait()

    def _run(self) -> None:
        self._free.acquire()
        while self._read_next(self):
            self._free.acquire()


class _Pipeline:
    """The pieces one after the other, as many being read as there are readers; a context manager, to end these.

    A lock for each piece says that it is there, and one for each buffer that it may be filled again. A queue and
    futures took longer than a third of the reading: half a thousand pieces take turns with Python's lock.
    """

    def __init__(self, pieces: Sequence[_Piece], descriptors: Mapping[Path, int]) -> None:
        self._pieces = pieces
        self._descriptors = descriptors
        self._unread = iter(range(len(pieces)))
        self._whole = [threading.Lock() for _ in pieces]
        for lock in self._whole:
            lock.acquire()
        self._found: list[_Reader | Exception | None] = [None for _ in pieces]
        self._at = -1
        self._here: _Reader | None = None
        self._readers: list[_Reader] = []

    def __enter__(self) -> "_Pipeline":
        return self

    def __exit__(self, *error: object) -> None:
        self._unread = iter(())
        for reader in self._readers:
            reader.join()

    def start(self, buffers: Sequence[_Buffer]) -> None:
        """Begin to read, into as many of the buffers as there are pieces."""
        self._readers.extend(_Reader(buffer, self._read_next) for buffer in buffers[: len(self._pieces)])

    def copy_to(self, data: torch.Tensor, place: TensorPlace) -> None:
        """Queue the copies of a tensor's bytes to `data` (n_bytes,); places come in the order of the pieces."""
        at = place.start
        while at < place.stop:
            piece, buffer = self._piece_with(place.path, at)
            stop = min(place.stop, piece.stop)
            is_whole = stop - at == place.spec.nbytes
            part = data if is_whole else data[at - place.start : stop - place.start]
            buffer.copy_to(part, at - piece.start, stop - piece.start)
            at = stop

    def _piece_with(self, path: Path, at: int) -> tuple[_Piece, _Buffer]:
        """The piece that has a byte of a file, once it is read; those before it are let go of."""
        while True:
            if self._here is not None:
                piece = self._pieces[self._at]
                if piece.start <= at < piece.stop and piece.path == path:
                    return piece, self._here.buffer
                self._here.go_on()
            self._at += 1
            self._whole[self._at].acquire()
            found = self._found[self._at]
            if isinstance(found, Exception):
                raise found
            self._here = found

    def _read_next(self, reader: _Reader) -> bool:
        """Fill a reader's buffer, by its thread; false where every piece is read, or being read."""
        reader.buffer.make()
        index = next(self._unread, None)  # in one step of Python's
        if index is None:
            return False
        piece = self._pieces[index]
        try:
            reader.buffer.fill(piece, self._descriptors[piece.path])
            self._found[index] = reader
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to the one who waits
            self._found[index] = error
        self._whole[index].release()
        return True


def _pieces(places: Sequence[TensorPlace], buffer_bytes: int) -> list[_Piece]:
    """What is to be read: tensors that lie one behind the other together, cut into pieces that fit a buffer."""
    runs: list[_Piece] = []
    for place in places:
        if runs and runs[-1].path == place.path and 0 <= place.start - runs[-1].stop <= _GAP_BYTES:
            runs[-1] = replace(runs[-1], stop=place.stop)
        elif place.spec.nbytes:
            runs.append(_Piece(place.path, place.start, place.stop))
    return [
        _Piece(run.path, start, min(start + buffer_bytes, run.stop))
        for run in runs
        for start in range(run.start, run.stop, buffer_bytes)
    ]


def _open_all(places: Sequence[TensorPlace], stack: ExitStack) -> dict[Path, int]:
    """A descriptor for each file, closed by `stack`."""
    descriptors: dict[Path, int] = {}
    for place in places:
        if place.path not in descriptors:
            try:
                file = stack.enter_context(place.path.open("rb", buffering=0))
            except OSError as error:
                raise unreadable(place.path, place.name, error) from error
            descriptors[place.path] = file.fileno()
    return descriptors


def _host_memory(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes on the host, pinned for CUDA unless the system refuses."""
    if device.type == "cuda":
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # too little memory that may be locked
            pass
    return torch.empty(size_bytes, dtype=torch.uint8)
