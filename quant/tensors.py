"""What the quantizer reads from: tensors by name, their shapes known before their data is touched."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSpecs(Protocol):
    """Tensors of which names, shapes and types are known, wherever their data are: enough for a plan."""

    def names(self) -> Sequence[str]:
        """All tensor names."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype; reads no data."""
        ...


class TensorSource(TensorSpecs, Protocol):
    """A checkpoint's tensors under their Hugging Face names, like model.layers.0.self_attn.q_proj.weight.

    They may arrive one after the other, from the network: methods without data load each once, in the order of
    `names`, and a build has the same bytes in whatever order they come.
    """

    def names(self) -> Sequence[str]:
        """All tensor names, in the order in which they are best loaded."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """By the name of each file of weights, what tells it from another, as JSON; reads little. For `--resume`."""
        ...

    def hashes(self, on_read: Callable[[int], None]) -> Mapping[str, Mapping[str, Any]]:
        """By the name of each file of weights, `size_bytes` and `sha256`, for the card; asked for last of all.

        `on_read` gets the bytes of each step, and in all those that `hash_bytes` says.
        """
        ...

    def hash_bytes(self) -> int:
        """How much `hashes` has to read."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU; it may be memory-mapped."""
        ...

    def release(self) -> None:
        """Unmap what `load` has mapped: pages that were read count as resident memory until then."""
        ...
