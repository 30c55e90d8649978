"""Round to nearest, with a clip searched for the large weights: without data, what is known of a channel's worth.

A weight's error counts `|w| + rms`, rms its group's root mean square: large weights stand where a model makes much of
an input, and clipping them costs more than their number says. (llama.cpp's k-quants weight errors likewise where they
have no data.) docs/log.md has what it gave.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.codes import Codes
from quant.method import Calibration, PreparedLayer
from quant.methods.rtn import codes_of, magnitude, search_grid

if TYPE_CHECKING:
    from quant.scheme import Scheme


@dataclass(frozen=True)
class WeightedRoundToNearest:
    """The method: any tensor alone, without data."""

    name: str = "rtn-w"
    needs_data: bool = False

    def prepare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, "Scheme"],
        scale_dtype: torch.dtype,
        calibration: Calibration | None,
    ) -> PreparedLayer:
        return PreparedLayer(weights, dict.fromkeys(schemes, round_weighted))


def round_weighted(
    weight: torch.Tensor,
    *,
    rows: slice = slice(None),
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Codes:
    """Codes for rows of a weight (rows, in_features) float32; `group_size` divides in_features."""
    groups = weight.view(weight.shape[0], -1, group_size)
    size = groups.abs()
    root = size.add_(groups.square().mean(-1, keepdim=True).sqrt_()).sqrt_()
    scales, zeros = search_grid(
        groups,
        lambda difference: magnitude(difference * root),
        bits=bits,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    return codes_of(groups, scales, zeros, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
