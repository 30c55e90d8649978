"""AWQ (Lin et al. 2023): scales for the inputs (`quant.methods.folding`), then a clip by the error of the outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.codes import Codes, joined
from quant.method import Calibration, PreparedLayer, Rounding
from quant.methods.folding import folded
from quant.methods.gptq import Gptq
from quant.methods.inputs import INPUTS, Chosen, affine, named, second_moment
from quant.methods.rtn import codes_of, search_grid
from quant.schemes.affine import Affine
from quant.tiles import map_tiles

if TYPE_CHECKING:
    from quant.scheme import Scheme

TILE_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Awq:
    """The method."""

    name: str = "awq"
    needs_data: bool = True

    def prepare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, "Scheme"],
        scale_dtype: torch.dtype,
        calibration: Calibration | None,
    ) -> PreparedLayer:
        assert calibration is not None
        scaled = folded(index, weights, schemes, scale_dtype, calibration)
        roundings: dict[str, Rounding] = {}
        for kinds in INPUTS:
            names = named(kinds, schemes)
            if names:
                moment = second_moment(calibration, index, scaled, names[0])
            for name in names:
                roundings[name] = Chosen(
                    clipped_codes(scaled[name], moment, affine(schemes[name]), scale_dtype)
                )
        return PreparedLayer(scaled, roundings)


@dataclass(frozen=True)
class AwqGptq:
    """AWQ's scales, and then GPTQ's codes for the weights that they give."""

    name: str = "awq-gptq"
    needs_data: bool = True

    def prepare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, "Scheme"],
        scale_dtype: torch.dtype,
        calibration: Calibration | None,
    ) -> PreparedLayer:
        assert calibration is not None
        scaled = folded(index, weights, schemes, scale_dtype, calibration)
        return Gptq().prepare(index, scaled, schemes, scale_dtype, calibration)


def clipped_codes(
    weight: torch.Tensor, moment: torch.Tensor, scheme: Affine, scale_dtype: torch.dtype
) -> Codes:
    """The nearest codes of a weight (rows, in_features), on the CPU, each group clipped for its part of the outputs.

    A group's part is `d M dᵀ`, d its error and M the block of `moment` (E[x xᵀ]) that belongs to its columns.
    """
    rows, in_features = weight.shape
    group_size = scheme.group_size or in_features
    blocks = moment.view(in_features // group_size, group_size, -1, group_size).diagonal(dim1=0, dim2=2)
    blocks = blocks.permute(2, 0, 1).contiguous()  # (n_groups, group_size, group_size)

    def measure(difference: torch.Tensor) -> torch.Tensor:
        by_group = difference.transpose(0, 1)  # (n_groups, rows, group_size)
        return ((by_group @ blocks) * by_group).sum(-1, keepdim=True).transpose(0, 1)

    bits, symmetric = scheme.bits, scheme.symmetric

    def choose(tile: slice) -> Codes:
        groups = weight[tile].to(moment.device, torch.float32).view(-1, len(blocks), group_size)
        scales, zeros = search_grid(groups, measure, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
        codes = codes_of(groups, scales, zeros, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
        return codes.cpu()

    return joined(map_tiles(choose, rows, max(1, TILE_WEIGHTS // in_features), moment.device))
