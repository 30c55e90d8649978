"""GPTQ (Frantar et al. 2022): the columns of a weight one after the other, each making up for the errors before it.

With `H = E[x xᵀ]` of a linear's inputs, rounding a row w to ŵ adds `e H eᵀ` to its squared error, `e = w − ŵ`. Write
`H = L D Lᵀ`, L lower triangular with ones on its diagonal: then that is `Σ_j D_jj (e_j + Σ_{i>j} e_i L_ij)²`. So going
from the last column to the first, column j is best rounded at `w_j + Σ_{i>j} e_i L_ij` (Chee et al. 2023, who show that
this is GPTQ). It takes one factor of H, and no inverse.

The columns are in the order of their `H_jj`, so that the largest are rounded first, while nothing has to be made up
for. Scales and zero points belong to the groups of columns as they are stored, and are chosen before ("static groups").
Then both are improved in turn (`quant.methods.descent`).

What a row is to give is `w x`, but its inputs are x̂, which the rounded linears before it have made. The weight that
comes closest on these, `w + E[(w x − w x̂) x̂ᵀ] H⁻¹` with `H = E[x̂ x̂ᵀ]`, is what is rounded, so that each linear makes up
for the errors of all before it. Where its output is added to the residual stream h, it makes up for `h − ĥ` too. The
regression is damped more than the rounding, or what it learns does not hold for other texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.codes import Codes, joined
from quant.method import Calibration, PreparedLayer, Rounding
from quant.methods.descent import descended
from quant.methods.inputs import INPUTS, Chosen, Inputs, affine, compared_inputs, named
from quant.methods.rtn import magnitude, nearest, search_grid
from quant.schemes.affine import Affine

if TYPE_CHECKING:
    from quant.scheme import Scheme

BLOCK = 128
"""Columns between two products with all errors before them."""

RIDGE = 0.5
"""Of the mean of H's diagonal, added to it where a weight is to make up for errors.

With SmolLM2's first 8 layers rounded, the KL on articles that it was not calibrated on is 0.0219 where nothing is made
up for, and with a ridge of 0.01, 0.1 and 0.5 it is 0.0203, 0.0162 and 0.0157.
"""

TILE_WEIGHTS = 1 << 24
"""Weights whose codes are chosen at once: 64 MB of float32."""

TILES_ON_GPU = 4
"""Tiles that a GPU takes as one, a gate of a 7B model: there a column costs its launches, however many rows it has."""

TILE_COPIES = 8
"""Of a tile's size that are in memory meanwhile: its target, scales, zero points, errors, codes in two orders."""


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
        """Each linear is given inputs that the quantized ones before it have made, in this layer and all before."""
        assert calibration is not None
        so_far = dict(weights)
        roundings: dict[str, Rounding] = {}
        for kinds in INPUTS:
            names = named(kinds, schemes)
            if not names:
                continue
            inputs = compared_inputs(calibration, index, so_far, weights, names[0])
            targets = {name: target(weights[name], inputs) for name in names}
            factor = Factor.of(inputs.moment, self.damping)
            del inputs
            for name in names:
                codes = improved_codes(targets.pop(name), factor, affine(schemes[name]), scale_dtype)
                so_far[name] = codes.dequantized()
                roundings[name] = Chosen(codes)
        calibration.advance_exact(index, weights)
        return PreparedLayer(weights, roundings)


def target(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The weight (rows, in_features) float32 whose outputs on the inputs that there are come closest to the exact ones.

    A ridge regression, with two matrices of the inputs' width in memory beside `inputs`. On n tokens, in_features / n
    of what it finds is chance: that much is taken off.
    """
    weight = weight.to(inputs.moment.device, torch.float32)
    missing = weight @ inputs.deviation
    if inputs.drift is not None:
        missing += inputs.drift
    damped = inputs.moment.clone()
    damped.diagonal().add_(RIDGE * (float(damped.diagonal().mean()) or 1.0))
    lower = torch.linalg.cholesky(damped)
    del damped  # the solver copies its factor
    change = torch.cholesky_solve(missing.T, lower).T
    return weight + max(0.0, 1 - len(lower) / inputs.n_tokens) * change


@dataclass(frozen=True)
class Factor:
    """order: the columns from the smallest to the largest `H_jj`. lower: L of H in that order.

    moment: H itself, damped, in the columns' own order. diagonal: H's before that, (n,).
    """

    order: torch.Tensor
    lower: torch.Tensor
    moment: torch.Tensor
    diagonal: torch.Tensor

    @staticmethod
    def of(moment: torch.Tensor, damping: float) -> "Factor":
        """Of `moment`, to which `damping` of its diagonal's mean is added; more, where it has no factor with that.

        A column that is never used gets that mean there, or a 1. At most two matrices of its size are in memory
        beside `moment`, which is kept and changed.
        """
        diagonal = moment.diagonal().clone()
        order = diagonal.argsort(stable=True)
        mean = float(diagonal.mean()) or 1.0
        while True:
            moment.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal + damping * mean))
            lower, failed = torch.linalg.cholesky_ex(moment[order[:, None], order])
            if not failed:
                return Factor(order, lower.div_(lower.diagonal().clone()), moment, diagonal)
            damping = max(10 * damping, 1e-4)


def improved_codes(weight: torch.Tensor, factor: Factor, scheme: Affine, scale_dtype: torch.dtype) -> Codes:
    """The codes of a weight (rows, in_features) float32, on the CPU, with coordinate descent after GPTQ.

    Whole rows that share a scale, at 8 bits mostly, are left as GPTQ has them.
    """

    def choose(rows: torch.Tensor) -> Codes:
        codes = gptq_codes(rows, factor, scheme, scale_dtype)
        return codes if scheme.group_size is None else descended(rows, codes, factor.moment, scheme.bits)

    n_weights = TILE_WEIGHTS * (TILES_ON_GPU if factor.moment.is_cuda else 1)
    return joined([choose(rows) for rows in weight.split(max(1, n_weights // weight.shape[1]))])


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
