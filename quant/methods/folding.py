"""Activation-aware scales (Lin et al. 2023, "AWQ"): what a linear's input columns are multiplied by before rounding.

A column that sees large inputs is worth more of its group's precision: multiplied by s > 1 it is rounded more finely
in relation to itself, if it does not make the group's range larger. The inputs are divided by s where they are made: in
the weight of the norm before, or in the rows of the linear before, since what is between these and the next one
multiplies each channel by itself (up_proj to down_proj) or sums over tokens (v_proj to o_proj). So the layer computes
the same as before, and is stored like any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.method import Calibration
from quant.methods.inputs import affine, named, second_moment
from quant.methods.rtn import full_grid, nearest
from quant.schemes.affine import Affine

if TYPE_CHECKING:
    from quant.scheme import Scheme

EXPONENTS = tuple(step / 20 for step in range(20))
SEARCH_ROWS = 512
"""Rows of each linear that a search looks at, evenly spaced."""

_LEAST = 1e-3
"""Of the largest input's size: smaller ones count as that large."""


@dataclass(frozen=True)
class Fold:
    """`readers`: linears that see the same input. `maker`: what makes it."""

    maker: str
    readers: tuple[str, ...]


FOLDS = (
    Fold("v_proj", ("o_proj",)),
    Fold("input_layernorm", ("q_proj", "k_proj", "v_proj")),
    Fold("up_proj", ("down_proj",)),
    Fold("post_attention_layernorm", ("gate_proj", "up_proj")),
)


def folded(
    index: int,
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, "Scheme"],
    scale_dtype: torch.dtype,
    calibration: Calibration,
) -> dict[str, torch.Tensor]:
    """The layer's weights with scales folded in: it computes what it did, but for float32's rounding.

    Linears that are to be quantized are returned in float32, norms in the dtype that they came in: a scale is what the
    norm, as it is stored, was really divided by. What is not to be quantized stays as it is, and so do its inputs.
    """
    found = {name: weight.float() if name in schemes else weight for name, weight in weights.items()}
    for fold in FOLDS:
        readers, (maker,) = named(fold.readers, schemes), named([fold.maker], found)
        may_change = maker in schemes or found[maker].dim() == 1
        if len(readers) < len(fold.readers) or not may_change:
            continue
        moment = second_moment(calibration, index, weights, readers[0])
        channels = Channels(len(found[maker]), len(moment) // len(found[maker]), calibration.head_dim)
        grids = [(found[name], affine(schemes[name])) for name in readers]
        found[maker], scale = divided(found[maker], best_scale(grids, moment, channels, scale_dtype))
        columns = channels.spread(scale)
        found |= {name: found[name] * columns.to(found[name].device) for name in readers}
    return found


@dataclass(frozen=True)
class Channels:
    """Of what a maker makes: `n` of them, and `n_repeats` columns of a reader for each.

    More than one with grouped-query attention, where heads of `head_dim` channels are repeated as wholes.
    """

    n: int
    n_repeats: int
    head_dim: int

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of channels (n,) to those of columns (n · n_repeats,)."""
        if self.n_repeats == 1:
            return values
        return values.view(-1, self.head_dim).repeat_interleave(self.n_repeats, dim=0).flatten()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The means over the columns (n · n_repeats,) of each channel: (n,)."""
        if self.n_repeats == 1:
            return values
        return values.view(-1, self.n_repeats, self.head_dim).mean(dim=1).flatten()


def best_scale(
    readers: Sequence[tuple[torch.Tensor, Affine]],
    moment: torch.Tensor,
    channels: Channels,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Of `size^a`, for the exponents a, the scale (n,) that puts the readers' outputs off the least.

    size: the root mean square of a channel. readers: weights (rows, n · n_repeats) float32, and how each is stored.
    """
    size = channels.gather(moment.diagonal()).sqrt()
    size = size.clamp(min=_LEAST * float(size.max()) or 1.0)
    samples = [(_sample(weight).to(moment.device), scheme) for weight, scheme in readers]

    def loss(scale: torch.Tensor) -> float:
        columns = channels.spread(scale)
        return sum(_output_error(*sample, moment, columns, scale_dtype) for sample in samples)

    return min((_centred(size**exponent) for exponent in EXPONENTS), key=loss)


def _centred(scale: torch.Tensor) -> torch.Tensor:
    """The geometric mean of the smallest and the largest becomes 1."""
    return scale / (scale.min() * scale.max()).sqrt()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    return weight[:: -(-len(weight) // SEARCH_ROWS)]


def _output_error(
    weight: torch.Tensor,
    scheme: Affine,
    moment: torch.Tensor,
    columns: torch.Tensor,
    scale_dtype: torch.dtype,
) -> float:
    """The mean square of what rounding `weight · columns` to nearest adds to the outputs, over all rows."""
    groups = (weight * columns).view(len(weight), -1, scheme.group_size or weight.shape[1])
    scale, zero = full_grid(groups, bits=scheme.bits, symmetric=scheme.symmetric, scale_dtype=scale_dtype)
    rounded = (nearest(groups, scale, zero, scheme.bits) - zero) * scale
    difference = rounded.flatten(1) / columns - weight
    return float(((difference @ moment) * difference).sum())


def divided(maker: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight (n,), or a linear's (n, in_features), divided by `scale` (n,); and what it was divided by.

    A norm's quotient is rounded to its own dtype. A channel that is 0 there stays, whatever divides it.
    """
    scale = scale.to(maker.device)
    if maker.dim() == 2:
        return maker / scale[:, None], scale
    quotient = (maker.float() / scale).to(maker.dtype)
    used = quotient != 0
    return quotient, torch.where(used, maker.float() / quotient.float(), 1.0)
