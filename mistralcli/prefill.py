"""Pre-fill's chunks as CUDA graphs: a short chunk is bound by its thousand launches, not by what they do.

A chunk's ids and positions lie at fixed addresses; a chunk shorter than its graph is padded with position −1. What is
captured is `Transformer.forward` itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mistralcli.cache import KVCache, Piece
from mistralcli.device import LARGE_CUDA_CHUNK, is_out_of_memory
from mistralcli.model import Transformer

if TYPE_CHECKING:
    from quant.kernels.ahead import Ahead

LENGTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Graphs' lengths, besides the chunk's own. Chunks between the last of them and a whole one run without a graph: they
keep a GPU busy for longer than their launches take."""

MOST_STAGED = 512
"""Tokens of a prompt that is copied to its sequence: 64 MiB for a 7B model. A longer one keeps a GPU busy anyhow."""


class CapturedForward:
    """`Transformer.forward` for chunks of up to `chunk` tokens of the sequences of one cache.

    The first chunk of a length runs as it is, which compiles its kernels; the second is captured. All chunks share
    their memory, captured or not, since no two run at once.
    """

    def __init__(self, model: Transformer, cache: KVCache, chunk: int) -> None:
        self._model = model
        self._cache = cache
        self._lengths = [length for length in LENGTHS if length < chunk] + [chunk]
        self._chunks: dict[tuple[int, int], _Chunk] = {}
        self._on_cuda = cache.last.device.type == "cuda"
        # Memory that is freed on one stream is not used again on another. It goes before the one that `Ahead` uses.
        self._stream = torch.cuda.Stream(cache.last.device, priority=-1) if self._on_cuda else None
        self._pool = torch.cuda.MemPool() if self._on_cuda else None
        self._ahead = _ahead(cache.last.device) if self._on_cuda and works_ahead(chunk) else None

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `Transformer.forward` of both (n_seqs, n_tokens), on the CPU; the result is valid until the next call."""
        n_tokens = token_ids.shape[1]
        length = next(length for length in self._lengths if length >= n_tokens)
        if max(LENGTHS) < n_tokens < length:
            with self._apart():
                return self._forward(
                    token_ids.to(self._cache.last.device), self._cache.begin(positions), positions
                )
        shape = (len(token_ids), length)
        chunk = self._chunks.get(shape)
        if chunk is None:
            chunk = self._chunks[shape] = _Chunk.empty(*shape, self._cache.last.device)
        self._cache.note(positions)
        chunk.fill(token_ids, positions)
        return self._run(chunk)[:, :n_tokens]

    def _run(self, chunk: "_Chunk") -> torch.Tensor:
        if chunk.may_be_captured:
            chunk.may_be_captured = False
            self._capture(chunk)
        if chunk.graph is not None and chunk.hidden is not None:
            chunk.graph.replay()
            return chunk.hidden
        with self._apart():
            hidden = self._forward_chunk(chunk)
        chunk.may_be_captured = self._on_cuda and not chunk.has_run
        chunk.has_run = True
        return hidden

    def _capture(self, chunk: "_Chunk") -> None:
        """Capture a chunk that has run; where memory is too short for it, it goes on running as it is."""
        assert self._pool is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool.id, stream=self._stream):  # type: ignore[arg-type]
                hidden = self._forward_chunk(chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            chunk.graph, chunk.hidden = graph, hidden

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Run what is done here where graphs are captured, so that their memory serves it too."""
        if self._stream is None or self._pool is None:
            yield
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            yield
        current.wait_stream(self._stream)

    def _forward_chunk(self, chunk: "_Chunk") -> torch.Tensor:
        return self._forward(chunk.token_ids, self._cache.begin_captured(chunk.positions), chunk.positions)

    def _forward(self, token_ids: torch.Tensor, pieces: list[Piece], positions: torch.Tensor) -> torch.Tensor:
        with nullcontext() if self._ahead is None else self._ahead.during_pass():
            hidden: torch.Tensor = self._model(token_ids, positions, self._cache, pieces)
        return hidden


class CapturedPrompts:
    """The prompts of single sequences of a cache of several, through graphs that serve them all.

    A graph writes to fixed addresses, and one for each sequence would be captured as often as there are sequences. So
    a prompt goes into a cache of its own, and from there to its place: a copy of 128 KiB a token for a 7B model.
    """

    def __init__(self, model: Transformer, cache: KVCache, chunk: int) -> None:
        """Takes the memory of MOST_STAGED positions.

        Raises:
            NotEnoughMemoryError: the device has no room for it.
        """
        self._cache = cache
        # Position p lies in slot p of both caches.
        self.most_tokens = min(MOST_STAGED, *(ring.capacity for ring in cache.rings))
        self._chunk = min(chunk, self.most_tokens)
        self._staged = KVCache(
            model.config,
            max_seq_len=self.most_tokens,
            slack=cache.slack,
            dtype=cache.dtype,
            device=cache.last.device,
        )
        self._captured = CapturedForward(model, self._staged, self._chunk)

    def __call__(self, index: int, token_ids: Sequence[int]) -> torch.Tensor:
        """Begin a sequence afresh with a prompt of at most `most_tokens`.

        Returns the hidden states after its last token, (dim,), valid until the next call.
        """
        n_tokens = len(token_ids)
        self._staged.rewind(0)
        for start in range(0, n_tokens, self._chunk):
            part = torch.tensor([token_ids[start : start + self._chunk]])
            hidden = self._captured(part, torch.arange(start, start + part.shape[1])[None])
        one = self._cache.sequence(index, n_tokens)
        for staged, layer in zip(self._staged.layers, one.layers, strict=True):
            buffers = layer.buffers()
            for name, buffer in staged.buffers().items():
                buffers[name][:, :, :n_tokens].copy_(buffer[:, :, :n_tokens])
        one.last.fill_(n_tokens - 1)
        return hidden[0, -1]


def works_ahead(chunk: int) -> bool:
    """Whether a GPU dequantizes weights ahead, which takes a second tile: where there is room for large chunks."""
    return chunk >= LARGE_CUDA_CHUNK


def _ahead(device: torch.device) -> "Ahead":
    """What dequantizes weights ahead of the products that take them."""
    from quant.kernels.ahead import Ahead  # takes Triton, which is there where anything is captured

    return Ahead(device)


@dataclass
class _Chunk:
    """What a graph reads, both (n_seqs, length) int64, and the graph with what it leaves, once there is one."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    has_run: bool = False
    may_be_captured: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    hidden: torch.Tensor | None = None

    @staticmethod
    def empty(n_seqs: int, length: int, device: torch.device) -> "_Chunk":
        ids = torch.zeros(n_seqs, length, dtype=torch.int64, device=device)
        return _Chunk(ids, torch.empty_like(ids))

    def fill(self, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Does not wait for the device: a step may be under way before the chunk."""
        n_tokens = token_ids.shape[1]
        self.token_ids[:, :n_tokens] = token_ids.to(self.token_ids.device, non_blocking=True)
        self.positions.fill_(-1)
        self.positions[:, :n_tokens] = positions.to(self.positions.device, non_blocking=True)
