"""FP8: weights of 8-bit floats with a factor for each block of them, or one for all.

`w[o, i] = weight[o, i] · weight_scale_inv[o // rows, i // columns]`: a factor, whatever its name says.
Read, not written: docs/format.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quant.errors import IntegrityError
from quant.schemes.dense import DenseAtLoad, fill_rows
from quant.tensors import TensorSpec

SCALE = "weight_scale_inv"
_EXPONENT_BIAS = 127
_NOT_A_NUMBER = 255
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXPONENT_DTYPES = (torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class Fp8(DenseAtLoad):
    """`block`: rows and columns that share a factor, None for one factor; those at the ends may be smaller.

    `exponents`: factors are stored as 8-bit exponents of 2 ("ue8m0").
    """

    block: tuple[int, int] | None = (128, 128)
    exponents: bool = False

    unused = ("activation_scale",)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("weight", SCALE)

    def applies(self, specs: Mapping[str, TensorSpec]) -> bool:
        """Not to a weight in an ordinary type: lists of what is not converted are not always complete."""
        return SCALE in specs or ("weight" in specs and specs["weight"].dtype == torch.float8_e4m3fn)

    def shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
        weight, scale = specs["weight"], specs[SCALE]
        if weight.dtype != torch.float8_e4m3fn or len(weight.shape) != 2:
            raise IntegrityError(
                f"weight is {weight.dtype} of shape {list(weight.shape)}; FP8 needs a matrix of {torch.float8_e4m3fn}"
            )
        allowed = _EXPONENT_DTYPES if self.exponents else _SCALE_DTYPES
        if scale.dtype not in allowed:
            raise IntegrityError(f"{SCALE} is stored as {scale.dtype} where {allowed[0]} is needed")
        out_features, in_features = weight.shape
        needed = (
            ()
            if self.block is None
            else (-(-out_features // self.block[0]), -(-in_features // self.block[1]))
        )
        if scale.shape != needed and not (self.block is None and scale.shape == (1,)):
            raise IntegrityError(f"{SCALE} has the shape {list(scale.shape)} where {list(needed)} is needed")
        return out_features, in_features

    def dense(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        weight, scale = tensors["weight"], self._factors(tensors[SCALE])
        dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        if self.block is None:
            fill_rows(dense, lambda start, stop: weight[start:stop].float() * scale)
            return dense
        n_rows, n_columns = self.block
        columns = torch.arange(weight.shape[1], device=weight.device) // n_columns

        def rows(start: int, stop: int) -> torch.Tensor:
            blocks = torch.arange(start, stop, device=weight.device) // n_rows
            return weight[start:stop].float() * scale[blocks][:, columns]

        fill_rows(dense, rows)
        return dense

    def _factors(self, stored: torch.Tensor) -> torch.Tensor:
        """In float32, where 2^−127 is no normal number, but exact."""
        if not self.exponents:
            return stored.float()
        exponents = stored.view(torch.uint8)
        if (exponents == _NOT_A_NUMBER).any():
            raise IntegrityError(f"{SCALE} holds a factor that is not a number")
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - _EXPONENT_BIAS)
