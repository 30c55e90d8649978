"""Memory that ran out, and how much a build takes at its peak, from shapes alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quant.errors import NotEnoughMemoryError
from quant.methods.gptq import TILE_COPIES, TILE_WEIGHTS
from quant.plan import PlannedTensor, units_by_layer
from quant.schemes.affine import Affine
from quant.tiles import MAX_THREADS

PROCESS_BYTES = 400 << 20
"""Python, torch and this program, before it has read a weight: 240 MB, and 40 more for what torch keeps meanwhile."""
BITSANDBYTES_BYTES = 256 << 20
"""What bitsandbytes and its tiles take beside that: 150 MB before it has read a weight."""
TILE_BYTES = 16 << 20
"""What a thread takes at most while it works on a tile of `TILE_WEIGHTS` weights."""
BATCH_TOKENS = 2048
"""Of a calibration's text, that go through a layer at once: of a 7B's widest activations, 117 MB in float32."""

_WORK_BYTES = 4
"""Of a number in float32, in which layers are computed."""


@dataclass(frozen=True)
class Peak:
    """The most that a build takes at once, in bytes.

    process: the program itself, and the tiles of its threads. tensors: at most the two largest, as they are read and as
    they are stored. layers: two of the largest, in float32. calibration: hidden states, activations of a batch, and
    what the method gathers. sampling, check: what it takes in all to have the model write a text before, and what
    the check takes after, the hidden states still there.
    """

    process: int
    tensors: int
    layers: int = 0
    calibration: int = 0
    sampling: int = 0
    check: int = 0

    @property
    def total(self) -> int:
        return max(self.process + self.tensors + self.layers + self.calibration, self.sampling, self.check)


def peak_without_data(planned: Sequence[PlannedTensor], n_threads: int) -> Peak:
    """A method that takes one tensor at a time: the largest one, as it is read and as it is stored."""
    tensors = max(t.spec.nbytes + (0 if t.scheme is None else t.stored_bytes) for t in planned)
    return Peak(_process_bytes(planned, n_threads), tensors)


def peak_with_data(
    planned: Sequence[PlannedTensor], n_threads: int, *, method: str, n_seqs: int, n_tokens: int
) -> Peak:
    """A method that takes one layer at a time, calibrated with `n_seqs` of `n_tokens`.

    2 · layer + 2 · tensor + c · n_seqs · n_tokens · dim · 4 + c · batch · (the layer's inputs and outputs) · 4 bytes,
    where c is 2 for gptq, which compares with the exact model, else 1; and k · in² · 4 for the second moment of the
    widest inputs, where k is 4 for gptq, which copies and factors it beside one more moment, else 1; and for gptq 3
    times the largest weight · 4, for its target and what that comes from, and 8 times a tile of it while codes are
    chosen.
    """
    in_layers = [unit.tensors for unit in units_by_layer(planned) if unit.index is not None]
    layer = max(sum(tensor.n_weights for tensor in tensors) for tensors in in_layers) * _WORK_BYTES
    largest = sorted(tensor.spec.nbytes for tensor in planned)[-2:]
    widths = max(sum(sum(t.spec.shape) for t in tensors if t.scheme is not None) for tensors in in_layers)
    states = hidden_bytes(planned, n_seqs * n_tokens) + max(BATCH_TOKENS, n_tokens) * widths * _WORK_BYTES
    quantized = [tensor for tensors in in_layers for tensor in tensors if tensor.scheme is not None]
    square = max(tensor.spec.shape[-1] for tensor in quantized) ** 2 * _WORK_BYTES
    if not method.endswith("gptq"):
        return Peak(_process_bytes(planned, n_threads), sum(largest), 2 * layer, states + square)
    weight = max(tensor.n_weights for tensor in quantized)
    calibration = (
        2 * states + 4 * square + (3 * weight + TILE_COPIES * min(TILE_WEIGHTS, weight)) * _WORK_BYTES
    )
    return Peak(_process_bytes(planned, n_threads), sum(largest), 2 * layer, calibration)


def hidden_bytes(planned: Sequence[PlannedTensor], n_tokens: int) -> int:
    """Hidden states of a calibration's text."""
    dim = next(tensor.spec.shape[-1] for tensor in planned if tensor.name == "model.embed_tokens.weight")
    return n_tokens * dim * _WORK_BYTES


def _process_bytes(planned: Sequence[PlannedTensor], n_threads: int) -> int:
    is_ours = all(tensor.scheme is None or isinstance(tensor.scheme, Affine) for tensor in planned)
    tiles = min(n_threads, MAX_THREADS) * TILE_BYTES
    return PROCESS_BYTES + tiles + (0 if is_ours else BITSANDBYTES_BYTES)


@contextmanager
def out_of_memory_as(message: str, hint: str) -> Iterator[None]:
    """Turn an error that says that memory ran out into a NotEnoughMemoryError with this message and hint."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(message, hint) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch raises a plain RuntimeError for it."""
    on_cpu = isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "Cannot allocate memory")
    )
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))
