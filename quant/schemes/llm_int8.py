"""LLM.int8 (Dettmers et al. 2022): weights and inputs in int8 by row, outlier columns apart.

Stored and computed by bitsandbytes: docs/format.md has the tensors. `w = q · SCB / 127`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quant.errors import IntegrityError
from quant.linear import QuantizedLinear
from quant.method import Rounding
from quant.methods.rtn import round_to_nearest
from quant.schemes.bnb import bitsandbytes
from quant.tensors import TensorSpec
from quant.tiles import map_tiles

TILE_WEIGHTS = 1 << 18
ROW_MAJOR = 0
"""The only `weight_format` that bitsandbytes still writes."""


@dataclass(frozen=True)
class LlmInt8:
    """`threshold`: input columns with a value of at least this magnitude are multiplied unquantized."""

    threshold: float = 6.0

    @property
    def name(self) -> str:
        return "llm.int8"

    @property
    def max_error(self) -> float:
        """The relative error that a sound weight stays below."""
        return 0.05

    def for_in_features(self, in_features: int) -> "LlmInt8":
        return self

    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The stored tensors of a weight (out_features, in_features), by suffix."""
        return {
            "weight": TensorSpec((out_features, in_features), torch.int8),
            "SCB": TensorSpec((out_features,), torch.float32),
            "weight_format": TensorSpec((), torch.uint8),
        }

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, rounding: Rounding = round_to_nearest
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a weight, by suffix, made from float16 as bitsandbytes makes them."""
        assert rounding is round_to_nearest, "LLM.int8 has no other method"
        functional = bitsandbytes().functional

        def quantize_rows(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scales, _ = functional.int8_vectorwise_quant(weight[rows].to(torch.float16))
            return codes, scales

        tile_rows = max(1, TILE_WEIGHTS // weight.shape[1])
        codes, scales = zip(*map_tiles(quantize_rows, len(weight), tile_rows, weight.device), strict=True)
        row_major = torch.tensor(ROW_MAJOR, dtype=torch.uint8)
        return {"weight": torch.cat(codes), "SCB": torch.cat(scales), "weight_format": row_major}

    def linear(self, in_features: int, out_features: int) -> "LlmInt8Linear":
        return LlmInt8Linear(self, in_features, out_features)


class LlmInt8Linear(QuantizedLinear):
    """Computes as bitsandbytes' Linear8bitLt does, with quantized inputs; `dense_rows` is the weight alone."""

    kept = frozenset({"weight"})

    qweight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, scheme: LlmInt8, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scheme = scheme
        self.register_buffer("qweight", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)

    def stored(self) -> dict[str, tuple[int, ...]]:
        specs = self.scheme.specs(self.out_features, self.in_features, torch.bfloat16)
        return {suffix: spec.shape for suffix, spec in specs.items()}

    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        if tensors["weight"].dtype != torch.int8 or tensors["weight_format"].item() != ROW_MAJOR:
            raise IntegrityError(
                f"the weight is {tensors['weight'].dtype} in format {tensors['weight_format'].item()}; "
                f"LLM.int8 needs int8 in format {ROW_MAJOR}"
            )
        self.qweight = tensors["weight"].to(device)
        self.scales = tensors["SCB"].float().to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        library = bitsandbytes()
        state = library.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.qweight, self.scales, self.scheme.threshold
        state.has_fp16_weights = state.is_training = False
        y: torch.Tensor = library.matmul(x.reshape(-1, self.in_features), self.qweight, state=state)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dense_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.qweight[start:stop].float() * self.scales[start:stop, None] / 127
