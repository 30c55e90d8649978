"""The rolling-buffer KV cache: position p lives in slot p mod capacity.

A layer with a sliding window needs only the last `sliding_window` positions, so its buffer is a ring of
`sliding_window + slack − 1` slots (Jiang et al. 2023, "Mistral 7B", section 2). `slack` is how many positions
may be written before they are attended to: a longer chunk goes through write-then-attend in pieces of at most
`slack`. A layer without a window gets one slot for each position.

Which position a slot holds follows from the last written position alone, and so does every mask: there is no
case for a ring that is "full" or has "wrapped".

A cache of int8 holds codes, and a scale for each key and each value: `key ≈ code · scale` (`quantized`).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import pad

from mistralcli.config import ModelConfig
from mistralcli.device import out_of_memory_as
from quant.registry import op

DEFAULT_SLACK = 512
GROWTH_SLOTS = 1024
"""On the CPU a buffer grows by this many slots, so that a short conversation takes little of a long context."""

SCALE_DTYPE = torch.float32
"""Of an int8 cache's scales: 3 % of the codes with head_dim 128. float16 would save half of that, but loses the scales
of values below 0.008, which some models give the first token, to its subnormal numbers."""


@dataclass(frozen=True)
class Ring:
    """Where positions live and what queries see; shared by all layers with the same window."""

    capacity: int
    sliding_window: int | None

    @staticmethod
    def of(sliding_window: int | None, max_seq_len: int, slack: int) -> "Ring":
        if sliding_window is None:
            return Ring(max_seq_len, None)
        return Ring(min(max_seq_len, sliding_window + slack - 1), sliding_window)

    def held(self, last: torch.Tensor, n_slots: int) -> torch.Tensor:
        """The position that each slot holds when `last` (n_seqs,) was written last: (n_seqs, n_slots), < 0 is empty."""
        slots = torch.arange(n_slots, device=last.device)
        return last[:, None] - (last[:, None] - slots) % self.capacity


@dataclass(frozen=True, eq=False)
class Seen:
    """What the queries of an attention see of a ring: query i the positions p with `i − sliding_window < p ≤ i`.

    positions: (n_seqs, n_tokens) int64, those of the queries and the last that were written: one after the other in
    each sequence, then −1 for padding, which sees nothing. n_slots: how many slots, from 0 on, hold what is seen.
    """

    positions: torch.Tensor
    ring: Ring
    n_slots: int

    @cached_property
    def mask(self) -> torch.Tensor:
        """Which slots each query sees, (n_seqs, n_tokens, n_slots) bool; made once for all layers of a ring."""
        held = self.ring.held(self.positions.amax(dim=1), self.n_slots)[:, None, :]
        query = self.positions[:, :, None]
        seen = (held >= 0) & (held <= query)
        window = self.ring.sliding_window
        return seen if window is None else seen & (held > query - window)

    @cached_property
    def written(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequence, token and slot of every position that is no padding; made once for all layers of a ring."""
        sequence, token = (self.positions >= 0).nonzero(as_tuple=True)
        return sequence, token, self.positions[sequence, token] % self.ring.capacity

    def to(self, device: torch.device | str) -> "Seen":
        return Seen(self.positions.to(device), self.ring, self.n_slots)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and float32 scales such that `x ≈ codes · scales[..., None]`, one scale for each vector of head_dim.

    `scale = max |x| / 127` and `code = x / scale`, rounded half to even: off by half a scale at most. A vector of zeros
    has codes of zero; one with a value that is not finite has a scale that is not either. x: (..., head_dim).
    """
    wide = x.float()
    scales = wide.abs().amax(-1).clamp_min(1e-30) / 127
    return (wide / scales[..., None]).round().to(torch.int8), scales


@op(cpu="mistralcli.kernels.cpu.pointwise:write_ring", cuda="mistralcli.kernels.pointwise:write_ring")
def write_ring(
    buffer: torch.Tensor, x: torch.Tensor, seen: Seen, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Store the keys or values of the tokens of `seen` in the slots of their positions, and return the buffer.

    buffer: (n_seqs, n_kv_heads, n_slots, head_dim); x: (n_seqs, n_tokens, n_kv_heads, head_dim), of any float type;
    scales: (n_seqs, n_kv_heads, n_slots), where the buffer is int8, and x is `quantized`.
    """
    sequence, token, slots = seen.written
    new = x[sequence, token]  # (n_written, n_kv_heads, head_dim)
    if scales is not None:
        new, scales[sequence, :, slots] = quantized(new)
    buffer[sequence, :, slots] = new.to(buffer.dtype)
    return buffer


@dataclass(frozen=True)
class Piece:
    """One write-then-attend step: at most `slack` tokens of a chunk, where a layer has a window. `seen` is by ring."""

    tokens: slice
    seen: dict[Ring, Seen]


class LayerCache:
    """Keys and values of one layer, each (n_seqs, n_kv_heads, allocated slots, head_dim).

    Where they are int8, `key_scales` and `value_scales` (n_seqs, n_kv_heads, allocated slots) belong to them.
    """

    def __init__(self, ring: Ring, keys: torch.Tensor) -> None:
        self.ring = ring
        self.keys = keys
        self.values = torch.zeros_like(keys)
        self.n_moves = 0  # how often the buffers have come to other addresses
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if keys.dtype == torch.int8:
            self.key_scales, self.value_scales = (
                keys.new_zeros(keys.shape[:3], dtype=SCALE_DTYPE) for _ in range(2)
            )

    @property
    def size_bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(tensor.nbytes for tensor in self.buffers().values())

    def buffers(self) -> dict[str, torch.Tensor]:
        """Its tensors by name: keys and values, and their scales where they are int8; slots are their third axis."""
        names = ("keys", "values", "key_scales", "value_scales")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def sequence(self, index: int) -> "LayerCache":
        """One sequence's part, in the same storage for as long as that does not grow."""
        one = copy.copy(self)
        for name, tensor in self.buffers().items():
            setattr(one, name, tensor[index : index + 1])
        return one

    def reserve(self, n_slots: int) -> None:
        """Make room for `n_slots` slots, keeping what is there. No position has wrapped while a buffer still grows."""
        missing = n_slots - self.keys.shape[2]
        if missing > 0:
            self.n_moves += (
                1  # before, for whoever is interrupted between the two: once too often does no harm
            )
            # All or none: memory may run out at the second.
            self.keys, self.values, self.key_scales, self.value_scales = (
                pad(self.keys, (0, 0, 0, missing)),
                pad(self.values, (0, 0, 0, missing)),
                None if self.key_scales is None else pad(self.key_scales, (0, missing)),
                None if self.value_scales is None else pad(self.value_scales, (0, missing)),
            )

    def write(self, k: torch.Tensor, v: torch.Tensor, piece: Piece) -> None:
        """Store the piece's keys and values, each (n_seqs, n_tokens, n_kv_heads, head_dim)."""
        write_ring(self.keys, k, piece.seen[self.ring], self.key_scales)
        write_ring(self.values, v, piece.seen[self.ring], self.value_scales)

    def read(
        self, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor, Seen, torch.Tensor | None, torch.Tensor | None]:
        """What `attention` takes behind q: keys and values of the slots in use, what is seen of them, their scales."""
        seen = piece.seen[self.ring]
        used = (slice(None), slice(None), slice(seen.n_slots))
        key_scales = None if self.key_scales is None else self.key_scales[used]
        value_scales = None if self.value_scales is None else self.value_scales[used]
        return self.keys[used], self.values[used], seen, key_scales, value_scales


class KVCache:
    """The caches of all layers and, for each sequence, the last position that counts (`last`)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_seq_len: int,
        n_seqs: int = 1,
        slack: int = DEFAULT_SLACK,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `max_seq_len` positions of each sequence, reserved at once except on the CPU, where it grows.

        dtype: what keys and values are stored as, a float type or torch.int8, which has scales.

        Raises:
            NotEnoughMemoryError: the device has no room for it.
        """
        self.slack = slack
        self.max_seq_len = max_seq_len
        self.dtype = dtype
        self.last = torch.full((n_seqs,), -1, dtype=torch.int64, device=device)
        self._furthest = -1  # the furthest position ever written: a rewind brings no overwritten slot back
        self._grows = torch.device(device).type == "cpu"
        rings = [Ring.of(window, max_seq_len, slack) for window in config.sliding_windows]
        self.rings = tuple(dict.fromkeys(rings))
        size_bytes = cache_size_bytes(config, max_seq_len, n_seqs=n_seqs, slack=slack, dtype=dtype)
        with out_of_memory_as(
            f"a cache for {max_seq_len} positions ({size_bytes / 1e9:.2f} GB) does not fit on {device}",
            "ask for a shorter context with --ctx",
        ):
            self.layers = [
                LayerCache(ring, torch.zeros(self._shape(config, ring), dtype=dtype, device=device))
                for ring in rings
            ]

    def _shape(self, config: ModelConfig, ring: Ring) -> tuple[int, int, int, int]:
        n_slots = 0 if self._grows else ring.capacity
        return (len(self.last), config.n_kv_heads, n_slots, config.head_dim)

    @property
    def size_bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(layer.size_bytes for layer in self.layers)

    def begin(self, positions: torch.Tensor) -> list[Piece]:
        """Make room for a chunk and say how its tokens are written and what they see, in pieces.

        positions: (n_seqs, n_tokens), one after the other in each sequence, −1 for padding behind them; best on the
        CPU, since all sizes come from them: elsewhere they are waited for. They count as written at once: after a
        chunk that was interrupted, `can_rewind` is on the safe side.
        """
        positions = positions.cpu()
        self.note(positions)
        on_device = positions.to(self.last.device, non_blocking=True)
        n_positions = [int(positions[:, tokens].max()) + 1 for tokens in self._slices(positions)]
        return self._pieces(on_device, n_positions)

    def begin_captured(self, positions: torch.Tensor) -> list[Piece]:
        """As `begin` for a chunk that is captured: positions on the device, which may be others in each replay.

        Every slot counts as in use. Before each replay `note` is told the positions.
        """
        return self._pieces(positions, [self.max_seq_len] * len(self._slices(positions)))

    def note(self, positions: torch.Tensor) -> None:
        """Make room for positions that are about to be written, and remember the furthest; best on the CPU."""
        furthest = int(positions.max())
        assert furthest < self.max_seq_len, f"position {furthest} in a cache of {self.max_seq_len}"
        self.reserve(furthest + 1)
        self._furthest = max(self._furthest, furthest)

    def advance(self) -> None:
        """Note that the next position of every sequence is being written, by a `Decoder`, which writes `last` too."""
        self._furthest += 1

    def reserve(self, n_positions: int) -> None:
        """Allocate what that many positions take, where buffers grow."""
        if self._grows:
            wanted = -(-n_positions // GROWTH_SLOTS) * GROWTH_SLOTS
            with out_of_memory_as(
                f"memory ran out with {n_positions} positions in the cache",
                "ask for a shorter --ctx, or close other programs",
            ):
                for layer in self.layers:
                    layer.reserve(min(layer.ring.capacity, wanted))

    def sequence(self, index: int, n_positions: int) -> "KVCache":
        """The cache of one sequence, emptied, with room for `n_positions`; the others stay as they are.

        It lives in this one's storage, until that grows. What it writes counts here too.
        """
        self.note(torch.tensor([[n_positions - 1]]))
        one = copy.copy(self)
        one.last = self.last[index : index + 1].fill_(-1)
        one.layers = [layer.sequence(index) for layer in self.layers]
        one._furthest, one._grows = -1, False
        return one

    def _slices(self, positions: torch.Tensor) -> list[slice]:
        """The tokens of each piece of a chunk: where no layer has a window, nothing is overwritten, and it is whole."""
        n_tokens = positions.shape[1]
        length = self.slack if any(ring.sliding_window for ring in self.rings) else n_tokens
        return [slice(start, start + length) for start in range(0, n_tokens, length)]

    def _pieces(self, positions: torch.Tensor, n_positions: Sequence[int]) -> list[Piece]:
        """The pieces of a chunk whose positions are on the device, each with what it sees of `n_positions`.

        `last` changes in place, since a captured step reads it. Nothing here waits for a device.
        """
        torch.maximum(self.last, positions.amax(dim=1), out=self.last)
        return [
            Piece(
                tokens,
                {ring: Seen(positions[:, tokens], ring, min(n, ring.capacity)) for ring in self.rings},
            )
            for tokens, n in zip(self._slices(positions), n_positions, strict=True)
        ]

    @property
    def furthest(self) -> int:
        """The furthest position ever written, −1 where none was: behind `last` after a rewind."""
        return self._furthest

    def hold(self, n_positions: int, furthest: int) -> None:
        """Take it that the first sequence's keys and values of so many positions have been put into their slots.

        furthest: that of the cache that they come from, which may have overwritten older ones and been rewound.
        """
        self.last[0] = n_positions - 1
        self._furthest = furthest

    def can_rewind(self, n_positions: int) -> bool:
        """Whether every slot that position `n_positions` and later will look at still holds what it needs."""
        return all(self._furthest < max(ring.capacity, n_positions + self.slack) for ring in self.rings)

    def rewind(self, n_positions: int) -> None:
        """Forget all positions from `n_positions` on; 0 is always possible, else `can_rewind` must hold."""
        assert n_positions == 0 or self.can_rewind(n_positions)
        self.last.clamp_(max=n_positions - 1)
        if n_positions == 0:
            self._furthest = -1


def cache_size_bytes(
    config: ModelConfig,
    max_seq_len: int,
    *,
    n_seqs: int = 1,
    slack: int = DEFAULT_SLACK,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes of a cache that is full: what `mistral show` prints and a KVCache grows to."""
    slots = sum(Ring.of(window, max_seq_len, slack).capacity for window in config.sliding_windows)
    vector_bytes = config.head_dim * dtype.itemsize + (SCALE_DTYPE.itemsize if dtype == torch.int8 else 0)
    return 2 * n_seqs * slots * config.n_kv_heads * vector_bytes


def n_slots_by_layer(config: ModelConfig, max_seq_len: int, slack: int = DEFAULT_SLACK) -> Sequence[int]:
    """The capacity of each layer's buffer."""
    return [Ring.of(window, max_seq_len, slack).capacity for window in config.sliding_windows]
