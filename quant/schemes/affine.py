"""int4 and int8: `w = (q − zero) · scale` with a scale for each group of columns or for each row.

Stored in compressed-tensors' `pack-quantized` format: docs/format.md has the tensors and their bytes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from quant.errors import IntegrityError, MistralError
from quant.kernels.cpu.layout import Interleaved, interleave, restored
from quant.linear import QuantizedLinear
from quant.method import Rounding
from quant.methods.rtn import round_to_nearest
from quant.ops import dequantize, int4_matmul, int8_matmul, interleaved_matmul
from quant.packing import pack_codes, pack_zeros, unpack_zeros, words
from quant.tensors import TensorSpec
from quant.tiles import map_tiles

GROUP_SIZES = (128, 64, 32)
TILE_WEIGHTS = 1 << 19
"""Weights quantized at once in a thread: 2 MB of float32 and a scratch copy. With an eighth of it, it takes half as
long again."""

_MATMULS = {4: int4_matmul, 8: int8_matmul}


@dataclass(frozen=True)
class Affine:
    """`bits`: 4 or 8. `group_size`: how many columns share a scale; None for whole rows, "per channel"."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _MATMULS:
            raise MistralError(f"{self.bits}-bit weights are not supported, only 4 and 8 bits")
        if self.group_size is not None and (self.group_size < 1 or self.group_size * self.bits % 8):
            raise MistralError(f"groups of {self.group_size} weights of {self.bits} bits are not supported")

    @property
    def name(self) -> str:
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"

    @property
    def max_error(self) -> float:
        """The relative error that a sound weight stays below: 0.08–0.13 and 0.006–0.01 are usual."""
        return 0.30 if self.bits == 4 else 0.05

    def for_in_features(self, in_features: int) -> "Affine":
        """The scheme that a layer gets: a group size that does not divide its in_features gives way.

        The largest of 128, 64 and 32 that is smaller and divides them takes its place, else one for the row.
        """
        if self.group_size is None or in_features % self.group_size == 0:
            return self
        fitting = (size for size in GROUP_SIZES if size < self.group_size and in_features % size == 0)
        return replace(self, group_size=next(fitting, None))

    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The stored tensors of a weight (out_features, in_features) of a model in `dtype`, by suffix."""
        n_groups = 1 if self.group_size is None else in_features // self.group_size
        specs = {
            "weight_packed": TensorSpec((out_features, words(in_features, self.bits)), torch.int32),
            "weight_scale": TensorSpec((out_features, n_groups), dtype),
            "weight_shape": TensorSpec((2,), torch.int64),
        }
        if not self.symmetric:
            specs["weight_zero_point"] = TensorSpec((words(out_features, self.bits), n_groups), torch.int32)
        return specs

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, rounding: Rounding = round_to_nearest
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a weight, by suffix; it is read a tile of rows at a time."""
        out_features, in_features = weight.shape
        specs = self.specs(out_features, in_features, dtype)
        stored = {suffix: torch.empty(spec.shape, dtype=spec.dtype) for suffix, spec in specs.items()}
        zeros = torch.empty(stored["weight_scale"].shape, dtype=torch.int8)

        def quantize_rows(rows: slice) -> None:
            tile = rounding(
                weight[rows].float(),
                rows=rows,
                bits=self.bits,
                group_size=self.group_size or in_features,
                symmetric=self.symmetric,
                scale_dtype=dtype,
            )
            stored["weight_packed"][rows] = pack_codes(tile.codes, self.bits)
            stored["weight_scale"][rows] = tile.scales
            if tile.zeros is not None:
                zeros[rows] = tile.zeros

        map_tiles(quantize_rows, out_features, max(1, TILE_WEIGHTS // in_features), weight.device)
        stored["weight_shape"] = torch.tensor([out_features, in_features])
        if not self.symmetric:
            stored["weight_zero_point"] = pack_zeros(zeros, self.bits)
        return stored

    def linear(self, in_features: int, out_features: int) -> "AffineLinear":
        """An empty layer; IntegrityError where the groups do not divide in_features."""
        if self.group_size is not None and in_features % self.group_size:
            raise IntegrityError(
                f"groups of {self.group_size} weights do not divide {in_features} in_features"
            )
        return AffineLinear(self, in_features, out_features)


class AffineLinear(QuantizedLinear):
    """Keeps the packed weight as it is stored, viewed as bytes, and the zero points as int8.

    Prepared on the CPU it has `interleaved` instead, and the other three are None. `columns` (in_features,) says
    which column each of the packed ones is, where groups of columns lay scattered; None where that is their order.
    """

    kept = frozenset({"weight_packed", "weight_scale"})

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    columns: torch.Tensor | None
    interleaved: Interleaved | None

    def __init__(self, scheme: Affine, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scheme = scheme
        self._forget_stored()
        self.register_buffer("columns", None, persistent=False)
        self.interleaved = None

    def _forget_stored(self) -> None:
        for name in ("qweight", "scales", "zeros"):
            self.register_buffer(name, None, persistent=False)

    def stored(self) -> dict[str, tuple[int, ...]]:
        specs = self.scheme.specs(self.out_features, self.in_features, torch.bfloat16)
        return {suffix: spec.shape for suffix, spec in specs.items()}

    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._check(tensors)
        zeros = None
        if not self.scheme.symmetric:
            zeros = unpack_zeros(tensors["weight_zero_point"], self.scheme.bits, self.out_features).to(device)
        self.take(tensors["weight_packed"].to(device), tensors["weight_scale"].to(device), zeros)

    def take(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        columns: torch.Tensor | None = None,
    ) -> None:
        """Let this be the weight: words as `quant.packing` makes them, and what stands at the class, on one device."""
        self.qweight, self.scales, self.zeros = packed.view(torch.uint8), scales, zeros
        self.columns, self.interleaved = columns, None

    def prepare(self) -> None:
        """On the CPU, take the layout of its kernels; not where the weight is of a shape that they do not know."""
        if self.qweight.device.type != "cpu" or os.environ.get("MISTRAL_CLI_KERNELS") == "reference":
            return
        self.interleaved = interleave(
            self.qweight, self.scales, self.zeros, self.in_features, self.scheme.bits
        )
        if self.interleaved is not None:
            self._forget_stored()

    def load_kernels(self) -> None:
        """On the CPU, by a product of no rows. Where the layer was not prepared it has none."""
        if self.interleaved is not None:
            interleaved_matmul(torch.empty(0, self.in_features), self.interleaved)

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        shape, expected = tensors["weight_shape"].tolist(), [self.out_features, self.in_features]
        if shape != expected:
            raise IntegrityError(f"weight_shape is {shape} where the configuration asks for {expected}")
        for suffix in tensors.keys() & {"weight_packed", "weight_zero_point"}:
            if tensors[suffix].dtype != torch.int32:
                raise IntegrityError(f"{suffix} is stored as {tensors[suffix].dtype}, not as torch.int32")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        if self.interleaved is not None:
            return interleaved_matmul(x, self.interleaved)
        y: torch.Tensor = _MATMULS[self.scheme.bits](x, self.qweight, self.scales, self.zeros)
        return y

    def dense_rows(self, start: int, stop: int) -> torch.Tensor:
        if self.interleaved is not None:
            qweight, scales, zeros = restored(self.interleaved, start, stop)
        else:
            rows = slice(start, stop)
            qweight, scales = self.qweight[rows], self.scales[rows]
            zeros = None if self.zeros is None else self.zeros[rows]
        packed = dequantize(qweight, scales, zeros, self.in_features, self.scheme.bits)
        if self.columns is None:
            return packed
        return torch.empty_like(packed).index_copy_(1, self.columns, packed)
