"""Tensors of safetensors files to a GPU: through a few pinned buffers, read ahead while the bus copies.

Copying from a memory map stops at every page that is not mapped yet, and the driver copies once more, from pageable
into pinned memory. Here threads read pieces of the files into pinned buffers, in the order in which the tensors are
asked for, and each piece is on its way to the device as soon as it is there. Beside the tensors that takes the buffers.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from mistralcli.errors import IntegrityError
from quant.tensors import TensorSpec

N_BUFFERS = 16
"""As many threads read: from the page cache one gives a quarter to an eighth of what a PCIe 5 bus takes."""
BUFFER_BYTES = 8 << 20
"""Large enough that a copy's start-up is nothing beside it, and small, so that the first is soon full."""


@dataclass(frozen=True)
class TensorPlace:
    """A stored tensor: its name, and where its bytes begin in which file."""

    name: str
    path: Path
    start: int
    spec: TensorSpec


@dataclass(frozen=True)
class _Piece:
    """Bytes `start` … `stop` of a tensor, as many as fit a buffer."""

    place: TensorPlace
    start: int
    stop: int


class _Buffer:
    """Memory that is filled from a file, and free again when the device has copied it.

    Pinned where that is possible; from pageable memory the driver copies by itself, before `copy_to` returns.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._bytes = _host_memory(size_bytes, device)
        self._view = self._bytes.numpy().data
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, piece: _Piece, descriptor: int) -> None:
        """Read a piece, by a thread: neither the wait nor the reading holds Python's lock."""
        self.wait()
        view = self._view[: piece.stop - piece.start]
        try:
            while view:
                at = piece.place.start + piece.stop - len(view)
                n_read = os.preadv(descriptor, [view], at)
                if n_read == 0:
                    raise EOFError(f"it ends at byte {at}")
                view = view[n_read:]
        except (OSError, EOFError) as error:
            raise unreadable(piece.place.path, piece.place.name, error) from error

    def copy_to(self, target: torch.Tensor) -> None:
        """Copy what was read to `target` (n_bytes,), on the current stream, without a wait."""
        target.copy_(self._bytes[: len(target)], non_blocking=True)
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
    pieces = [_cut(place, buffer_bytes) for place in places]
    buffers = [_Buffer(buffer_bytes, device) for _ in range(min(n_buffers, sum(map(len, pieces))))]
    with ExitStack() as stack:
        descriptors = _open_all(places, stack)
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(buffers)), "read weights"))
        ahead = zip((piece for some in pieces for piece in some), cycle(buffers), strict=False)
        filling: deque[tuple[_Buffer, Future[None]]] = deque()

        def start_reading(n_pieces: int) -> None:
            for piece, buffer in islice(ahead, n_pieces):
                filling.append((buffer, pool.submit(buffer.fill, piece, descriptors[piece.place.path])))

        start_reading(len(buffers))
        for place, its_pieces in zip(places, pieces, strict=True):
            data = torch.empty(place.spec.nbytes, dtype=torch.uint8, device=device)
            for piece in its_pieces:
                buffer, filled = filling.popleft()
                filled.result()
                buffer.copy_to(data[piece.start : piece.stop])
                start_reading(1)
            yield data.view(place.spec.dtype).view(place.spec.shape)
            del data  # else it would live until the next has its memory
        for buffer in buffers:
            buffer.wait()


def _cut(place: TensorPlace, buffer_bytes: int) -> list[_Piece]:
    n_bytes = place.spec.nbytes
    starts = range(0, n_bytes, buffer_bytes)
    return [_Piece(place, start, min(start + buffer_bytes, n_bytes)) for start in starts]


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
