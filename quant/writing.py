"""Tensors of a source into the files of a build: quantized or copied, their errors measured on what was stored."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from quant.errors import IntegrityError, UsageError
from quant.linear import QuantizedLinear
from quant.method import Rounding
from quant.methods.rtn import round_to_nearest
from quant.plan import PlannedTensor, stored_specs
from quant.safetensors_file import SafetensorsWriter
from quant.scheme import Scheme
from quant.tiles import map_tiles

_TILE_WEIGHTS = 1 << 19


class ShardWriter:
    """The weight files of a build, whose tensors are written in any order; a context manager, to close them.

    done: names of the source's tensors that were written by an earlier process.
    """

    def __init__(
        self,
        directory: Path,
        shards: Mapping[str, Sequence[PlannedTensor]],
        dtype: torch.dtype,
        done: Collection[str] = (),
    ) -> None:
        self._dtype = dtype
        self._files: dict[str, SafetensorsWriter] = {}
        self._stack = ExitStack()
        for file_name, tensors in shards.items():
            written = stored_specs([tensor for tensor in tensors if tensor.name in done])
            file = SafetensorsWriter(directory / file_name, stored_specs(tensors), written)
            self._files |= dict.fromkeys([tensor.name for tensor in tensors], file)
            self._stack.enter_context(file)

    def write(
        self, tensor: PlannedTensor, weight: torch.Tensor, rounding: Rounding = round_to_nearest
    ) -> tuple[float | None, QuantizedLinear | None]:
        """Write what the build stores for `weight`.

        Returns its relative error and the layer that holds what was stored; None for both where it is a copy.

        Raises:
            IntegrityError: it has NaN or Inf.
            UsageError: its scheme cannot hold its values.
        """
        require_finite(tensor.name, weight)
        file = self._files[tensor.name]
        if tensor.scheme is None:
            file.write(tensor.name, weight)
            return None, None
        stored = tensor.scheme.quantize(weight, self._dtype, rounding)
        for suffix, part in stored.items():
            file.write(f"{tensor.module}.{suffix}", part)
        linear = loaded(tensor.scheme, weight, stored)
        error, norm = error_and_norm(weight, linear)
        if not math.isfinite(error):
            raise UsageError(
                f"{tensor.name} has values that {tensor.scheme.name} cannot hold", "choose another scheme"
            )
        return error / (norm or 1.0), linear

    def sync(self) -> None:
        """Have on the disk what was written until now."""
        for file in set(self._files.values()):
            file.sync()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """IntegrityError, naming the tensor, where it has NaN or Inf."""
    if weight.is_floating_point() and weight.numel():
        lowest, highest = weight.aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise IntegrityError(
                f"tensor {name} has values that are not finite ({lowest.item()} … {highest.item()})",
                "the model is damaged: pull it again",
            )


def loaded(scheme: Scheme, weight: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> QuantizedLinear:
    """The layer that holds what was stored for `weight`, on its device."""
    out_features, in_features = weight.shape
    linear = scheme.linear(in_features, out_features)
    linear.load_stored(stored, weight.device)
    return linear


def error_and_norm(weight: torch.Tensor, linear: QuantizedLinear) -> tuple[float, float]:
    """`‖w − ŵ‖` and `‖w‖` (Frobenius), a tile of rows at a time."""

    def norms(rows: slice) -> tuple[float, float]:
        tile = weight[rows].float()
        difference = linear.dense_rows(rows.start, rows.stop) - tile
        return float(torch.linalg.vector_norm(difference)), float(torch.linalg.vector_norm(tile))

    tiles = map_tiles(norms, linear.out_features, max(1, _TILE_WEIGHTS // linear.in_features), weight.device)
    error, norm = (math.hypot(*values) for values in zip(*tiles, strict=True))
    return error, norm
