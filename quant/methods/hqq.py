"""Half-quadratic quantization (Badri & Shaji 2023, "HQQ"): scales and zero points without data.

`Σ |w − ŵ|^p` with p < 1 lets few weights be off by much, those that lie far out, so that many are off by less. It is
minimized by turns: with the codes fixed, what is left over is shrunk to its large values, `e = shrink(w − ŵ)`, and
scale and zero point are then those of least squares for `w − e`; with these fixed, codes are the nearest. The paper
moves the zero point alone, which is a float there. Here it is an integer of the codes' range, which leaves it little to
do, and a symmetric scheme has none: so the scale moves as well.
"""

import torch

from quant.codes import Codes
from quant.method import WithoutData
from quant.methods.rtn import codes_of, nearest, search_grid, smallest_scale

EXPONENT = 0.7
STEPS = 20
STRENGTH, GROWTH = 10.0, 1.01
"""The paper's: of shrinking at first, and by what factor it is weaker after each step."""

_LEAST_ERROR = 1e-6
"""In steps of the grid: below it `|e|^(p−1)` is that of this."""


def half_quadratic(
    weight: torch.Tensor,
    *,
    rows: slice = slice(None),
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Codes:
    """Codes for rows of a weight (rows, in_features) float32; `group_size` divides in_features.

    Starts from the clip that round to nearest finds, and keeps for each group the best grid that it meets. Errors are
    measured in steps of the first grid, so that the paper's strength suits weights of any size.
    """
    groups = weight.view(weight.shape[0], -1, group_size)
    scale, zero = search_grid(groups, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    unit = scale.abs()
    best_scale, best_zero = scale, zero
    least = torch.full_like(scale, torch.inf)
    strength = STRENGTH
    for _ in range(STEPS):
        codes = nearest(groups, scale, zero, bits)
        error = torch.addcmul(groups, codes - zero, scale, value=-1).div_(unit)
        loss = error.abs().pow_(EXPONENT).sum(-1, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        target = groups - _shrunk(error, strength) * unit
        if not symmetric:
            zero = _mean_zero(codes, target, scale, bits)
        scale = _least_squares(codes - zero, target, scale, scale_dtype)
        strength *= GROWTH
    return codes_of(groups, best_scale, best_zero, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)


HQQ = WithoutData("hqq", half_quadratic)


def _shrunk(error: torch.Tensor, strength: float) -> torch.Tensor:
    """The large values of an error: `sign(e) · max(0, |e| − |e|^(p−1) / strength)`, as in the paper."""
    size = error.abs()
    slope = size.clamp(min=_LEAST_ERROR).pow_(EXPONENT - 1).div_(strength)
    return size.sub_(slope).clamp_(min=0).copysign_(error)


def _mean_zero(codes: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The integer zero point next to the mean of `q − w / s`."""
    mean = (codes - target / scale).mean(-1, keepdim=True)
    return mean.round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)


def _least_squares(
    steps: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, scale_dtype: torch.dtype
) -> torch.Tensor:
    """The scale of `scale_dtype` for which `steps · scale` is nearest to `target`; `scale` where that is 0."""
    square = steps.square().sum(-1, keepdim=True)
    found = ((steps * target).sum(-1, keepdim=True) / square.clamp_(min=1.0)).to(scale_dtype).float()
    return torch.where(found.abs() < smallest_scale(scale_dtype), scale, found)
