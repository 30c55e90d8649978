"""Weights that are stored quantized and dense once they are read, since no kernel of ours multiplies with them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quant.errors import IntegrityError
from quant.packing import WORD_BITS
from quant.schemes.affine import Affine
from quant.tensors import TensorSpec
from quant.tiles import map_tiles

TILE_WEIGHTS = 1 << 20
"""Weights dequantized at once in a thread, 4 MB of float32."""


class DenseAtLoad(ABC):
    """How such a weight (out_features, in_features) is stored. Immutable.

    `unused` are the suffixes of tensors that may be there too, and of which the weight does not depend.
    """

    unused: tuple[str, ...] = ()

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors that the weight is made of."""

    @abstractmethod
    def applies(self, specs: Mapping[str, TensorSpec]) -> bool:
        """Whether what is stored, by suffix, is of this kind; a weight that is not is an ordinary one."""

    @abstractmethod
    def shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """out_features and in_features, by the headers of the tensors alone.

        Raises:
            IntegrityError: their shapes or types contradict each other; one is named.
        """

    @abstractmethod
    def dense(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight, rounded once, from its value in float32, to `dtype`; on the device of the tensors.

        Raises:
            IntegrityError: what a tensor holds contradicts the others.
        """


def fill_rows(dense: torch.Tensor, rows: Callable[[int, int], torch.Tensor]) -> None:
    """Put `rows(start, stop)`, which is float32, into a matrix, a tile of rows at a time."""

    def fill(tile: slice) -> None:
        dense[tile] = rows(tile.start, tile.stop)

    map_tiles(fill, len(dense), max(1, TILE_WEIGHTS // dense.shape[1]))


@dataclass(frozen=True)
class DenseAffine(DenseAtLoad):
    """int4 or int8 of an embedding: its rows are looked up, not multiplied."""

    affine: Affine

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.affine.specs(1, self.affine.group_size or 1, torch.float32))

    def applies(self, specs: Mapping[str, TensorSpec]) -> bool:
        return "weight" not in specs

    def shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
        packed = specs["weight_packed"].shape
        if len(packed) != 2:
            raise IntegrityError(f"weight_packed has the shape {list(packed)}, which is no matrix")
        out_features, in_features = packed[0], packed[1] * WORD_BITS // self.affine.bits
        for suffix, shape in self.affine.linear(in_features, out_features).stored().items():
            if specs[suffix].shape != shape:
                raise IntegrityError(
                    f"{suffix} has the shape {list(specs[suffix].shape)} where {list(shape)} is needed"
                )
        return out_features, in_features

    def dense(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        specs = {suffix: TensorSpec(tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}
        out_features, in_features = self.shape(specs)
        linear = self.affine.linear(in_features, out_features)
        linear.load_stored(tensors, tensors["weight_packed"].device)
        dense = torch.empty(out_features, in_features, dtype=dtype, device=linear.qweight.device)
        fill_rows(dense, linear.dense_rows)
        return dense
