"""Tensors of safetensors files to a GPU: through a few pinned buffers, read ahead while the bus copies.

Copying from a memory map stops at every page that is not mapped yet, and the driver copies once more, from pageable
into pinned memory. Here threads read pieces of the files into pinned buffers, in the order in which the tensors are
asked for, and each piece is on its way to the device as soon as it is there. Beside the tensors that takes the buffers.

A piece is a buffer full, whatever tensors it is of, and tensors that stay as they come share memory on the device, a
slab: a model has more small ones than pieces, and what each costs beside its bytes, an allocation, a copy, two threads'
taking turns with Python's lock, would be most of the time.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mistralcli.errors import IntegrityError
from quant.huge_pages import huge_pages
from quant.tensors import TensorSpec

N_BUFFERS = 12
"""As many threads read: from the page cache one gives a quarter to an eighth of what a PCIe 5 bus takes. On 16 cores 16
take longer: they leave none for the thread that copies."""
BUFFER_BYTES = 8 << 20
"""Large enough that a copy's start-up is nothing beside it, and small, so that the first is soon full."""
SLAB_BYTES = 256 << 20
"""Tensors that share memory take no more than that together: a driver has no hole of any size to give."""
_GAP_BYTES = 4096
"""So many bytes that nobody asked for are read with those around them."""
_ALIGNMENT = 128
"""A line of a GPU's cache. Where weights began at any multiple of 16, decoding was 4 % slower."""


@dataclass(frozen=True, eq=False)
class TensorPlace:
    """A stored tensor: its name, and where its bytes begin in which file. Equal to itself alone, and so hashed fast."""

    name: str
    path: Path
    start: int
    spec: TensorSpec

    @cached_property
    def stop(self) -> int:
        return self.start + self.spec.nbytes


@dataclass
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

    It is asked for in huge pages, which reading gets from the system and the driver pins ten times as fast as small
    ones. (torch's own pinned memory takes longer than reading 4 GB, the first time.) Where it cannot be pinned, the
    driver copies by itself, before `copy_to` returns.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        """Raises: MemoryError: there is none."""
        memory = huge_pages(size_bytes)
        self._bytes, self._view = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)
        self._device = device
        self._is_pinned: bool | None = None if device.type == "cuda" else False
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, piece: _Piece, descriptor: int) -> None:
        """Read a piece, by a thread: neither the wait nor the reading holds Python's lock."""
        self._wait()
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
        if self._is_pinned is None:  # now that it has its pages
            self._is_pinned = _pin(self._bytes, self._device)

    def copy_to(self, target: torch.Tensor, start: int, stop: int) -> None:
        """Copy bytes `start` … `stop` to `target` (n_bytes,), on the current stream, without a wait."""
        target.copy_(self._bytes[start:stop], non_blocking=True)

    def release(self) -> None:
        """All copies are queued: what waits for the buffer from now on waits for them."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Give the memory back, once the device has copied it."""
        self._wait()
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        del self._bytes, self._view

    def _wait(self) -> None:
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


class Staging:
    """Threads that read tensors ahead into a pinned buffer each, for the device to copy from.

    A context manager, to end them. They read from the start, while a model is made for the tensors.
    """

    def __init__(
        self,
        places: Sequence[TensorPlace],
        device: torch.device,
        *,
        n_buffers: int = N_BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """places: in the order in which the tensors will be asked for.

        Raises:
            IntegrityError: a file cannot be opened.
            MemoryError: there is no memory for the buffers.
        """
        self._places = places
        self._device = device
        pieces = _pieces(places, buffer_bytes)
        with ExitStack() as files:
            descriptors = _open_all(places, files)
            buffers = [_Buffer(buffer_bytes, device) for _ in range(min(n_buffers, len(pieces)))]
            self._pipeline = _Pipeline(pieces, descriptors, buffers)
            self._files = files.pop_all()

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *error: object) -> None:
        with self._files:  # closed behind the readers, which have their descriptors
            self._pipeline.end()

    def tensors(
        self, kept: Collection[str] = frozenset(), on_host: Collection[str] = frozenset()
    ) -> Iterator[torch.Tensor]:
        """Yield the tensors, each on the device in the type that it is stored in; once.

        kept: the names of tensors that will be held as long as each other, so that they may share memory.
        on_host: the names of those that are wanted on the CPU.

        Their copies are queued on the current stream: what is queued there later finds them whole, and the memory of a
        tensor that was dropped is written only after what was queued to read it. So they need no stream of their own.

        Raises:
            IntegrityError: a file cannot be read, or ends too early; the tensor is named.
        """
        for place, slab in zip(self._places, self._slabs(kept, on_host), strict=True):
            try:
                yield slab.tensor(place, self._pipeline)
            except _UnreadError as failure:
                behind = [one for one in self._places if one.path == failure.path and one.stop > failure.at]
                cause = failure.__cause__
                assert isinstance(cause, Exception)
                name = min(behind, key=lambda one: one.start).name
                raise unreadable(failure.path, name, cause) from failure

    def _slabs(self, kept: Collection[str], on_host: Collection[str]) -> list["_Slab"]:
        """For each of the tensors the slab that it is in: those that are kept and lie one behind the other share it."""
        slabs: list[_Slab] = []
        shared: _Slab | None = None
        for place in self._places:
            if place.name in on_host:
                slabs.append(_Slab(place, torch.device("cpu")))
            elif shared is not None and place.name in kept and shared.admits(place):
                shared.add(place)
                slabs.append(shared)
            else:
                slabs.append(_Slab(place, self._device))
                shared = slabs[-1] if place.name in kept else None
        return slabs


@dataclass
class _Stretch:
    """Bytes of a file that lie in a slab as they do there, `shift` further back; copied are those to `copied_to`."""

    shift: int
    stop: int
    copied_to: int


class _Slab:
    """Memory on a device for tensors that lie one behind the other in a file; each begins where a line does."""

    def __init__(self, place: TensorPlace, device: torch.device) -> None:
        self._device = device
        self._last = place
        self._stretches = {place: _Stretch(place.start, place.stop, place.start)}
        self._n_bytes = place.spec.nbytes  # up to the end of the last tensor
        self._data: torch.Tensor | None = None

    def admits(self, place: TensorPlace) -> bool:
        """Whether a tensor may share it."""
        fits = self._n_bytes + place.spec.nbytes + _ALIGNMENT <= SLAB_BYTES
        return fits and _follows(place, self._last)

    def add(self, place: TensorPlace) -> None:
        stretch = self._stretches[self._last]
        if (place.start - stretch.shift) % _ALIGNMENT:
            offset = -(-self._n_bytes // _ALIGNMENT) * _ALIGNMENT
            stretch = _Stretch(place.start - offset, place.stop, place.start)
        stretch.stop = place.stop
        self._n_bytes = stretch.stop - stretch.shift
        self._stretches[place] = stretch
        self._last = place

    def tensor(self, place: TensorPlace, pipeline: "_Pipeline") -> torch.Tensor:
        """One of its tensors, once what the pipeline has of it is being copied; they are asked for in their order.

        What a piece has of a stretch is copied at once, with what it has of the next tensors.
        """
        if self._data is None:
            self._data = torch.empty(self._n_bytes, dtype=torch.uint8, device=self._device)
        stretch = self._stretches[place]
        at = max(stretch.copied_to, place.start)  # bytes between tensors may be in no piece
        while at < place.stop:
            piece, buffer = pipeline.piece_with(place.path, at)
            stop = min(stretch.stop, piece.stop)
            target = self._data[at - stretch.shift : stop - stretch.shift]
            buffer.copy_to(target, at - piece.start, stop - piece.start)
            at = stretch.copied_to = stop
        own = self._data[place.start - stretch.shift : place.stop - stretch.shift]
        if place is self._last:
            self._data = None  # else it would live until the next has its memory
        return own.view(place.spec.dtype).view(place.spec.shape)


class _Reader:
    """A thread that reads pieces into a buffer of its own: one when told to begin, then whenever one is let go of."""

    def __init__(self, buffer: _Buffer, read_next: Callable[["_Reader"], bool]) -> None:
        """read_next: reads the next piece into the reader's buffer; false where there is none."""
        self.buffer = buffer
        self._read_next = read_next
        self._free = threading.Lock()
        self._free.acquire()
        self._thread = threading.Thread(target=self._run, name="read weights", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Read the first piece."""
        self._free.release()

    def go_on(self) -> None:
        """All copies out of the buffer are queued: read the next piece."""
        self.buffer.release()
        self._free.release()

    def join(self) -> None:
        """Wait for the end of the thread, and for the device to have copied the buffer; there is nothing to read."""
        if self._free.locked():
            self._free.release()
        self._thread.join()

    def _run(self) -> None:
        self._free.acquire()
        while self._read_next(self):
            self._free.acquire()
        self.buffer.close()


class _Pipeline:
    """The pieces one after the other, as many being read as there are readers.

    A lock for each piece says that it is there, and one for each buffer that it may be filled again. A queue and
    futures took longer than a third of the reading: half a thousand pieces take turns with Python's lock.
    """

    def __init__(
        self, pieces: Sequence[_Piece], descriptors: Mapping[Path, int], buffers: Sequence[_Buffer]
    ) -> None:
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
        try:
            self._readers.extend(_Reader(buffer, self._read_next) for buffer in buffers)
            # Not before all are there: a thread is made slowly while others take pages.
            for reader in self._readers:
                reader.begin()
        except BaseException:  # such as that the system has no more threads
            self.end()
            raise

    def end(self) -> None:
        """Read no more, and wait for the readers and for the device."""
        self._unread = iter(())
        try:
            if self._here is not None:
                self._here.buffer.release()
        finally:
            for reader in self._readers:
                reader.join()

    def piece_with(self, path: Path, at: int) -> tuple[_Piece, _Buffer]:
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


def _follows(place: TensorPlace, before: TensorPlace | _Piece) -> bool:
    """Whether a tensor lies right behind, but for a few bytes."""
    return 0 <= place.start - before.stop <= _GAP_BYTES and place.path == before.path


def _pieces(places: Sequence[TensorPlace], buffer_bytes: int) -> list[_Piece]:
    """What is to be read: tensors that lie one behind the other together, cut into pieces that fit a buffer."""
    runs: list[_Piece] = []  # which grow: a new one for each of some hundred tensors took 3 ms
    for place in places:
        if runs and _follows(place, runs[-1]):
            runs[-1].stop = place.stop
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


def _pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Pin pages for a GPU; false where the system refuses: it limits how much may be locked."""
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
