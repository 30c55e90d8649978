"""What methods with data share: which linears of a layer see the same input, and how large it is, and how far off."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.codes import Codes
from quant.errors import IntegrityError, UsageError
from quant.method import Calibration
from quant.schemes.affine import Affine

if TYPE_CHECKING:
    from quant.scheme import Scheme

INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The linears of a layer by what they are given, in the order in which a layer computes them."""

STREAMS = {"o_proj": ("input_layernorm",), "down_proj": ("post_attention_layernorm",)}
"""The linears whose output is added to the residual stream, and the norms that are given it before."""


def kind(name: str) -> str:
    """`down_proj` of `model.layers.3.mlp.down_proj.weight`."""
    return name.split(".")[-2]


def named(kinds: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the tensor names that are of these kinds, in the order of `kinds`."""
    by_kind = {kind(name): name for name in names}
    return [by_kind[wanted] for wanted in kinds if wanted in by_kind]


def second_moment(
    calibration: Calibration, index: int, weights: Mapping[str, torch.Tensor], name: str
) -> torch.Tensor:
    """The mean of `x xᵀ` over all tokens, x the inputs of a linear: (in_features, in_features) float32.

    Half of the Hessian of the linear's mean squared output error, on the device that the layer runs on.

    Raises:
        IntegrityError: an input is not finite.
    """
    moment = Mean()
    calibration.run(index, weights, {name}, lambda name, x: moment.add(x, x))
    mean = moment.value()
    _require_finite(mean.diagonal(), name)
    return mean


@dataclass(frozen=True)
class Inputs:
    """The inputs x̂ of a linear, in a model whose linears before it are rounded, beside x in the exact one.

    moment: E[x̂ x̂ᵀ]. deviation: E[(x − x̂) x̂ᵀ]. drift: E[(h − ĥ) x̂ᵀ], h the residual stream (dim) that the linear's
    output is added to; None where it is added to none. n_tokens: over how many the means are.
    """

    moment: torch.Tensor
    deviation: torch.Tensor
    drift: torch.Tensor | None
    n_tokens: int


def compared_inputs(
    calibration: Calibration,
    index: int,
    weights: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    name: str,
) -> Inputs:
    """What a linear is given in layer `index` with `weights`, after layers as they are stored, and with `exact`.

    On the device that the layer runs on; two matrices of the inputs' width are in memory.

    Raises:
        IntegrityError: an input is not finite.
    """
    moment, deviation, drift = Mean(), Mean(), Mean()
    stream = next(iter(named(STREAMS.get(kind(name), ()), weights)), None)

    def observe(seen: Mapping[str, torch.Tensor], exact_seen: Mapping[str, torch.Tensor]) -> None:
        x = seen[name].float()
        moment.add(x, x)
        deviation.add(exact_seen[name] - x, x)
        if stream is not None:
            drift.add(exact_seen[stream] - seen[stream], x)

    calibration.compare(index, weights, exact, {name} if stream is None else {name, stream}, observe)
    added_to = None if stream is None else drift.value()
    inputs = Inputs(moment.value(), deviation.value(), added_to, moment.n_tokens)
    for mean in (inputs.deviation, inputs.drift):  # what is not finite in the exact model fills a row of one
        if mean is not None:
            _require_finite(mean[:, 0], name)
    _require_finite(inputs.moment.diagonal(), name)
    return inputs


class Mean:
    """The mean of `y xᵀ` over the tokens added: (len(y), len(x)) float32. Nothing else of its size is in memory."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._sum: torch.Tensor | None = None

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y, x: (n_tokens, …)."""
        y, x = y.float(), x.float()
        if self._sum is None:
            self._sum = x.new_zeros(y.shape[1], x.shape[1])
        self._sum.addmm_(y.T, x)
        self.n_tokens += len(x)

    def value(self) -> torch.Tensor:
        """Once all are added."""
        assert self._sum is not None, "no token was seen"
        return self._sum.div_(self.n_tokens)


def _require_finite(values: torch.Tensor, name: str) -> None:
    """Of a second moment the diagonal is enough: no other value is larger than the largest of these."""
    if not values.isfinite().all():
        raise IntegrityError(
            f"the inputs of {name} are not finite on the calibration text",
            "the model is damaged: pull it again, or calibrate in float32",
        )


def affine(scheme: "Scheme") -> Affine:
    """The scheme, which must be one whose codes we choose: int4 or int8."""
    if not isinstance(scheme, Affine):
        raise UsageError(f"{scheme.name} has its own codes", "choose rtn, or int4 or int8")
    return scheme


@dataclass(frozen=True)
class Chosen:
    """The rounding of a tensor whose codes are known already."""

    codes: Codes

    def __call__(
        self,
        weight: torch.Tensor,
        *,
        rows: slice,
        bits: int,
        group_size: int,
        symmetric: bool,
        scale_dtype: torch.dtype,
    ) -> Codes:
        mine = self.codes
        n_groups = weight.shape[1] // group_size
        assert mine.scales.dtype == scale_dtype and mine.scales.shape[1] == n_groups
        assert (mine.zeros is None) == symmetric
        return Codes(mine.codes[rows], mine.scales[rows], None if mine.zeros is None else mine.zeros[rows])
