"""What the quantizer reads from: tensors by name, their shapes known before their data is touched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A checkpoint's tensors under their Hugging Face names, like model.layers.0.self_attn.q_proj.weight."""

    def names(self) -> Sequence[str]:
        """All tensor names."""
        ...

    def files(self) -> Sequence[Path]:
        """The weight files; they are hashed for the build's card."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype; reads no data."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU; it may be memory-mapped."""
        ...

    def release(self) -> None:
        """Unmap what `load` has mapped: pages that were read count as resident memory until then."""
        ...
