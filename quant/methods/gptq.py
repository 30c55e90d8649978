"""GPTQ (Frantar et al. 2022): the columns of a weight one after the other, each making up for the errors before it.

With `H = E[x xᵀ]` of a linear's inputs, rounding a row w to ŵ adds `e H eᵀ` to its squared error, `e = w − ŵ`. Write
`H = L D Lᵀ`, L lower triangular with ones on its diagonal: then that is `Σ_j D_jj (e_j + Σ_{i>j} e_i L_ij)²`. So going
from the last column to the first, column j is best rounded at `w_j + Σ_{i>j} e_i L_ij` (Chee et al. 2023, who show that
this is GPTQ). It takes one factor of H, and no inverse.

The columns are in the order of their `H_jj`, so that the largest are rounded first, while nothing has to be made up
for. Scales and zero points belong to the groups of columns as they are stored, and are chosen before ("static groups").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.codes import Codes
from quant.method import Calibration, PreparedLayer, Rounding
from quant.methods.inputs import INPUTS, Chosen, affine, named, second_moment
from quant.methods.rtn import magnitude, nearest, search_grid
from quant.schemes.affine import Affine

if TYPE_CHECKING:
    from quant.scheme import Scheme

BLOCK = 128
"""Columns between two products with all errors before them."""


@dataclass(frozen=True)
class Gptq:
    """The method. `damping`: how much of the mean of H's diagonal is added to it, as in the paper."""

    damping: float = 0.01
    name: str = "gptq"
    needs_data: bool = True

    def prepare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, "Scheme"],
        scale_dtype: torch.dtype,
        calibration: Calibration | None,
    ) -> PreparedLayer:
        """Each linear is given inputs that the quantized ones before it in the layer have made."""
        assert calibration is not None
        so_far = dict(weights)
        roundings: dict[str, Rounding] = {}
        for kinds in INPUTS:
            names = named(kinds, schemes)
            if not names:
                continue
            factor = Factor.of(second_moment(calibration, index, so_far, names[0]), self.damping)
            for name in names:
                codes = gptq_codes(weights[name].float(), factor, affine(schemes[name]), scale_dtype)
                so_far[name] = codes.dequantized()
                roundings[name] = Chosen(codes)
        return PreparedLayer(weights, roundings)


@dataclass(frozen=True)
class Factor:
    """order: the columns from the smallest to the largest `H_jj`. lower: L of H in that order. diagonal: H's, (n,)."""

    order: torch.Tensor
    lower: torch.Tensor
    diagonal: torch.Tensor

    @staticmethod
    def of(moment: torch.Tensor, damping: float) -> "Factor":
        """Of `moment` with `damping` of its diagonal's mean added to that; more, where it has no factor with that.

        A column that is never used gets that mean there, or a 1. At most two matrices of its size are in memory
        beside `moment`.
        """
        diagonal = moment.diagonal().clone()
        order = diagonal.argsort(stable=True)
        mean = float(diagonal.mean()) or 1.0
        ordered = moment[order[:, None], order]
        while True:
            damped = torch.where(diagonal == 0, mean, diagonal + damping * mean)[order]
            ordered.diagonal().copy_(damped)
            lower, failed = torch.linalg.cholesky_ex(ordered)
            if not failed:
                return Factor(order, lower.div_(lower.diagonal().clone()), diagonal)
            damping = max(10 * damping, 1e-4)


def gptq_codes(weight: torch.Tensor, factor: Factor, scheme: Affine, scale_dtype: torch.dtype) -> Codes:
    """The codes of a weight (rows, in_features) float32, on the CPU; its rows do not depend on one another.

    Scales are those whose nearest codes are off the least, each column's error weighted with its `H_jj`.
    """
    weight = weight.to(factor.lower.device)
    rows, in_features = weight.shape
    group_size = scheme.group_size or in_features
    groups = weight.view(rows, -1, group_size)
    importance = factor.diagonal.view(-1, group_size).sqrt()
    scales, zeros = search_grid(
        groups,
        lambda difference: magnitude(difference * importance),
        bits=scheme.bits,
        symmetric=scheme.symmetric,
        scale_dtype=scale_dtype,
    )
    group_of = factor.order // group_size
    codes = torch.empty_like(weight.T)
    codes[factor.order] = _round_columns(
        weight.T[factor.order],
        factor.lower,
        scales[..., 0].T[group_of],
        zeros[..., 0].T[group_of],
        scheme.bits,
    )
    return Codes(
        codes.T.to(torch.int8).contiguous().cpu(),
        scales[..., 0].to(scale_dtype).cpu(),
        None if scheme.symmetric else zeros[..., 0].to(torch.int8).cpu(),
    )


def _round_columns(
    columns: torch.Tensor, lower: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    """Codes as floats for columns (in_features, rows), in the order of L, the last first; scales and zeros likewise."""
    errors = torch.empty_like(columns)
    codes = torch.empty_like(columns)
    for stop in range(len(columns), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        targets = torch.addmm(columns[start:stop], lower[stop:, start:stop].T, errors[stop:])
        for j in range(stop - 1, start - 1, -1):
            nearest(targets[j - start], scales[j], zeros[j], bits, out=codes[j])
            errors[j] = columns[j] - (codes[j] - zeros[j]) * scales[j]
            targets[: j - start].addr_(lower[j, start:j], errors[j])
    return codes
