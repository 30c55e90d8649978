"""Tiles of dequantized weights: one by one, or for a prompt ahead of the products that take them.

Dequantizing is bound by memory and cuBLAS by arithmetic, so they are done at once: a prompt takes weight after weight
in the same order every time, so that while one tile is multiplied, a stream of less priority dequantizes the next into
a second buffer. It gets the multiprocessors that cuBLAS leaves idle at the end of each product.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from quant.kernels.dequantize import dequantize
from quant.kernels.matvec import Weight

TILE_BYTES = 128 << 20
"""The most that is dequantized at once: a gate or a head of a 7B model whole."""

N_BUFFERS = 2

_ahead: ContextVar["Ahead | None"] = ContextVar("ahead", default=None)


@dataclass(frozen=True)
class _Tile:
    """Rows from `start` on of a weight, in a type."""

    weight: Weight
    start: int
    n_rows: int
    dtype: torch.dtype

    @property
    def n_elements(self) -> int:
        return self.n_rows * self.weight.in_features

    def is_of(self, other: "_Tile") -> bool:
        """Whether both are the same rows of what lies at the same place, in the same type."""
        mine, its = self.weight.words, other.weight.words
        same_rows = (self.start, self.n_rows, self.dtype) == (other.start, other.n_rows, other.dtype)
        return same_rows and mine.data_ptr() == its.data_ptr()

    def write(self, out: torch.Tensor) -> torch.Tensor:
        """Dequantize it to the beginning of `out`, (n_elements or more,); the tile (n_rows, in_features) there."""
        tile = self.view(out)
        dequantize(self.weight, self.start, tile)
        return tile

    def view(self, out: torch.Tensor) -> torch.Tensor:
        return out[: self.n_elements].view(self.n_rows, -1)


def dequantized_tiles(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a weight (out_features, in_features) in `dtype`, tile after tile, each with its first row's number.

    What was queued on the current stream before the next one is asked for may read a tile; nothing later.
    """
    tiles = _tiles_of(weight, dtype)
    ahead = _ahead.get()
    buffer = None
    for tile in tiles:
        prepared = None if ahead is None else ahead.take(tile)
        if prepared is not None:
            yield tile.start, prepared
            del prepared
            assert ahead is not None
            ahead.let_go()
            continue
        if buffer is None:
            buffer = torch.empty(tiles[0].n_elements, dtype=dtype, device=weight.words.device)
        yield tile.start, tile.write(buffer)


def _tiles_of(weight: Weight, dtype: torch.dtype) -> list[_Tile]:
    rows = min(weight.out_features, max(1, TILE_BYTES // (weight.in_features * dtype.itemsize)))
    starts = range(0, weight.out_features, rows)
    return [_Tile(weight, start, min(rows, weight.out_features - start), dtype) for start in starts]


class Ahead:
    """Learns in which order a forward pass takes tiles, and dequantizes them ahead in those that come after it.

    Weights must stay where they are. It takes two buffers of the largest tile's size while a pass runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._order: list[_Tile] = []
        self._is_learning = True
        self._pass: _Pass | None = None

    @contextmanager
    def during_pass(self) -> Iterator[None]:
        """One forward pass, on the stream that is current, which may be captured."""
        token = _ahead.set(self)
        try:
            yield
        except BaseException:
            if self._is_learning:
                self._order.clear()
            raise
        finally:
            _ahead.reset(token)
            if self._pass is not None:
                self._pass.end()
            self._pass = None
            self._is_learning = not self._order

    def take(self, tile: _Tile) -> torch.Tensor | None:
        """The dequantized tile, valid until `let_go`; None where it is not the next one that this expects."""
        if self._is_learning:
            self._order.append(tile)
            return None
        if self._pass is None and tile.is_of(self._order[0]):
            self._pass = _Pass(self._order, self._stream)
        return None if self._pass is None else self._pass.take(tile)

    def let_go(self) -> None:
        """The product with the tile that was taken last is queued."""
        assert self._pass is not None
        self._pass.let_go()


class _Pass:
    """The tiles of one forward pass, in their order; `_at` is the one that is expected next."""

    def __init__(self, order: Sequence[_Tile], stream: torch.cuda.Stream | None) -> None:
        self._order = order
        self._stream = stream
        self._at = 0
        size = max(tile.n_elements for tile in order)
        words = order[0].weight.words
        self._buffers = [
            torch.empty(size, dtype=order[0].dtype, device=words.device)
            for _ in range(min(N_BUFFERS, len(order)))
        ]
        self._written: dict[int, torch.cuda.Event] = {}
        for index in range(len(self._buffers)):
            self._write(index)

    def take(self, tile: _Tile) -> torch.Tensor | None:
        if self._at == len(self._order) or not tile.is_of(self._order[self._at]):
            return None
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._written.pop(self._at))
        return tile.view(self._buffers[self._at % len(self._buffers)])

    def let_go(self) -> None:
        self._at += 1
        self._write(self._at - 1 + len(self._buffers))

    def end(self) -> None:
        """What the stream does belongs to the pass: whoever waits for the pass waits for it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _write(self, index: int) -> None:
        """Dequantize a tile, behind what was queued to read its buffer."""
        if index >= len(self._order):
            return
        aside: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            aside = torch.cuda.stream(self._stream)
        with aside:
            self._order[index].write(self._buffers[index % len(self._buffers)])
            if self._stream is not None:
                self._written[index] = self._stream.record_event()
