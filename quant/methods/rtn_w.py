"""Round to nearest, with a clip searched for the large weights: without data, what is known of a channel's worth.

A weight's error counts `|w| + rms`, rms its group's root mean square: large weights stand where a model makes much of
an input, and clipping them costs more than their number says. (llama.cpp's k-quants weight errors likewise where they
have no data.) docs/log.md has what it gave.
"""

import torch

from quant.codes import Codes
from quant.method import WithoutData
from quant.methods.rtn import codes_of, magnitude, search_grid


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


RTN_W = WithoutData("rtn-w", round_weighted)
