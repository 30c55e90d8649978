"""What methods with data share: which linears of a layer see the same input, and how large it is."""

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

    Half of the Hessian of the linear's mean squared output error, on the device that the layer runs on. Nothing
    else of its size is in memory while it is summed up.

    Raises:
        IntegrityError: an input is not finite.
    """
    in_features = weights[name].shape[1]
    moment: torch.Tensor | None = None
    n_tokens = 0

    def observe(name: str, x: torch.Tensor) -> None:
        nonlocal moment, n_tokens
        x = x.float()
        if moment is None:
            moment = x.new_zeros(in_features, in_features)
        moment.addmm_(x.T, x)
        n_tokens += len(x)

    calibration.run(index, weights, {name}, observe)
    assert moment is not None, "no token was seen"
    if not moment.diagonal().isfinite().all():  # no other value is larger than the largest of these
        raise IntegrityError(
            f"the inputs of {name} are not finite on the calibration text",
            "the model is damaged: pull it again, or calibrate in float32",
        )
    return moment.div_(n_tokens)


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
