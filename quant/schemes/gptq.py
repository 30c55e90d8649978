"""GPTQ's stored form (Frantar et al. 2023), by any method that writes it, as an int4 or int8 layer of our own.

`w[o, i] = (u[i, o] − Z[g, o]) · scales[g, o]` with g = g_idx[i], u and Z unsigned. Stored transposed: docs/format.md
has the tensors. A word of qweight is one of ours, codes u = q + 2^(bits−1) in the same order: loading transposes words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quant.errors import IntegrityError
from quant.packing import WORD_BITS, unpack_codes
from quant.schemes.act_order import columns_by_group, with_columns
from quant.schemes.affine import Affine, AffineLinear


@dataclass(frozen=True)
class Gptq:
    """`group_size`: None for whole rows. `zero_offset`: what zero points are less than they mean, 1 in version 1."""

    bits: int
    group_size: int | None
    zero_offset: int = 1
    symmetric: bool = True

    def linear(self, in_features: int, out_features: int) -> "GptqLinear":
        """An empty layer; IntegrityError where words do not divide the weight."""
        return GptqLinear(self, in_features, out_features)


class GptqLinear(AffineLinear):
    """Where the groups do not divide in_features the last has fewer columns: smaller ones that do repeat the scales."""

    kept = frozenset()  # all are put in another order

    def __init__(self, layout: Gptq, in_features: int, out_features: int) -> None:
        codes = WORD_BITS // layout.bits
        if in_features % codes or out_features % codes:
            raise IntegrityError(
                f"a weight of {out_features} × {in_features} has no whole words of {codes} codes, as GPTQ packs them"
            )
        self._group_size = min(layout.group_size or in_features, in_features)
        fitting = math.gcd(self._group_size, in_features)
        super().__init__(Affine(layout.bits, fitting, layout.symmetric), in_features, out_features)
        self._layout = layout

    def stored(self) -> dict[str, tuple[int, ...]]:
        codes = WORD_BITS // self.scheme.bits
        n_groups = -(-self.in_features // self._group_size)
        return {
            "qweight": (self.in_features // codes, self.out_features),
            "qzeros": (n_groups, self.out_features // codes),
            "scales": (n_groups, self.out_features),
            "g_idx": (self.in_features,),
        }

    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        check_dtypes(tensors)
        columns = columns_by_group(tensors["g_idx"], self._group_size)
        packed = tensors["qweight"].to(device).T.contiguous()
        if columns is not None:
            columns = columns.to(device)
            packed = with_columns(packed, columns, self.scheme.bits)
        scales = self._by_fitting_group(tensors["scales"].to(device))
        zeros = self._by_fitting_group(self._zeros(tensors["qzeros"].to(device)))
        self.take(packed, scales, None if self.scheme.symmetric and not zeros.any() else zeros, columns)

    def _zeros(self, qzeros: torch.Tensor) -> torch.Tensor:
        """Signed zero points (n_groups, out_features) int8.

        A quantizer's lie between 0 and 2^bits − 1, so in version 1 all ones, one less than 0, stand for 0.
        """
        half, mask = 1 << self.scheme.bits - 1, (1 << self.scheme.bits) - 1
        signed = unpack_codes(qzeros, self.scheme.bits, self.out_features)
        unsigned = (
            signed.view(torch.uint8) + (half + self._layout.zero_offset) & mask
        )  # wraps around, as it should
        return (unsigned - half).view(torch.int8)

    def _by_fitting_group(self, values: torch.Tensor) -> torch.Tensor:
        """(n_groups, out_features) to (out_features, groups of the size that divides)."""
        fitting = self.scheme.group_size
        assert fitting is not None
        repeated = values.repeat_interleave(self._group_size // fitting, dim=0)
        return repeated[: self.in_features // fitting].T.contiguous()


def check_dtypes(tensors: Mapping[str, torch.Tensor]) -> None:
    """IntegrityError where a tensor of GPTQ's or AWQ's is not of the type that they store."""
    for suffix in ("qweight", "qzeros"):
        if tensors[suffix].dtype != torch.int32:
            raise IntegrityError(f"{suffix} is stored as {tensors[suffix].dtype}, not as {torch.int32}")
    if tensors["scales"].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise IntegrityError(f"scales are stored as {tensors['scales'].dtype}, not as {torch.float16}")
