"""Coordinate descent after GPTQ: each scale and each code in turn is set to what is best with all others as they are.

The error of a row, `e H eᵀ` with `e = w − ŵ`, is a parabola in one scale or one code, whose lowest point `e H` and H's
diagonal tell. No step makes it larger, and GPTQ, whose scales were chosen before all codes and whose early codes before
the late ones, leaves a tenth of it to be had. docs/log.md has what it gave.
"""

import torch

from quant.codes import Codes
from quant.methods.rtn import smallest_scale

SWEEPS = 4
"""Over all columns."""


def descended(weight: torch.Tensor, codes: Codes, moment: torch.Tensor, bits: int) -> Codes:
    """Better codes and scales for a weight (rows, in_features) float32, and the same zero points; on the codes' device.

    moment: H, (in_features, in_features). Its device is where the work is done.
    """
    group_size = len(moment) // codes.scales.shape[1]
    scale_dtype = codes.scales.dtype
    scales = codes.scales.to(moment.device, torch.float32).T.contiguous()  # (n_groups, rows)
    zeros = torch.zeros_like(scales) if codes.zeros is None else codes.zeros.to(scales).T
    levels = codes.codes.to(scales).T.contiguous()  # (in_features, rows), codes − zeros
    levels.view(-1, group_size, len(weight)).sub_(zeros[:, None])
    errors = weight.T - (levels.view(-1, group_size, len(weight)) * scales[:, None]).view_as(levels)
    lowest, highest = -(1 << bits - 1) - zeros, (1 << bits - 1) - 1 - zeros
    for _ in range(SWEEPS):
        for group in range(len(scales)):
            columns = slice(group * group_size, (group + 1) * group_size)
            block, slopes = moment[columns, columns], moment[columns] @ errors
            parts = levels[columns], errors[columns], slopes
            scales[group] = _better_scale(*parts, block, scales[group], scale_dtype)
            _better_levels(*parts, block, scales[group], lowest[group], highest[group])
    levels.view(-1, group_size, len(weight)).add_(zeros[:, None])
    found = levels.T.to(codes.codes).contiguous()
    return Codes(found, scales.T.to(codes.scales).contiguous(), codes.zeros)


def _better_scale(
    levels: torch.Tensor,
    errors: torch.Tensor,
    slopes: torch.Tensor,
    block: torch.Tensor,
    scale: torch.Tensor,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """The best scale (rows,) of a group, as `scale_dtype` has it. errors and slopes, `H e`, follow it.

    levels, errors, slopes: (group_size, rows). block: H of the group's columns.
    """
    curvature = (levels * (block @ levels)).sum(0)
    best = (scale + (levels * slopes).sum(0) / curvature).to(scale_dtype).float()
    sound = best.isfinite() & (best.abs() >= smallest_scale(scale_dtype))
    best = torch.where(sound, best, scale)
    change = levels * (scale - best)
    errors += change
    slopes += block @ change
    return best


def _better_levels(
    levels: torch.Tensor,
    errors: torch.Tensor,
    slopes: torch.Tensor,
    block: torch.Tensor,
    scale: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
) -> None:
    """Set the levels of a group to the best ones, column by column; shapes as in `_better_scale`."""
    steps = 1 / (block.diagonal()[:, None] * scale)  # from a slope to levels
    steps.masked_fill_(steps.isinf(), 0)  # where all are 0, at the least scale: 0 · inf is NaN
    for j in range(len(levels)):
        best = torch.addcmul(levels[j], slopes[j], steps[j]).round_().clamp_(lowest, highest)
        change = (levels[j] - best).mul_(scale)
        levels[j] = best
        errors[j] += change
        slopes.addr_(block[:, j], change)
