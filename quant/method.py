"""Methods, that is how the codes of a layer's weights are chosen, and what one that needs data is given.

A method prepares a layer: it may change weights without changing what the layer computes (awq), and gives each
tensor that is to be quantized a rounding, which a scheme then asks for the codes of a tile of rows at a time.
`quant.methods.table` has them by name.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quant.codes import Codes

if TYPE_CHECKING:
    from quant.scheme import Scheme  # which imports a method, its default

Observe = Callable[[str, torch.Tensor], None]
"""Called with the full name of a linear's weight and a batch of its inputs (n_tokens, in_features)."""

Compare = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None]
"""Called with a batch of what modules are given, by the full names of their weights (n_tokens, in_features): in the
model as it is stored so far, and in the exact one."""


class Rounding(Protocol):
    """Chooses the codes of a weight's rows. Each row's codes depend on that row alone."""

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
        """Codes, on its device or the CPU, for `weight` (rows, in_features) float32: `rows` of the whole tensor.

        `group_size` divides in_features. Scales are of `scale_dtype` already, so codes are chosen for what is
        stored. Called from several threads at once.
        """
        ...


class Calibration(Protocol):
    """A model's hidden states on a text, before one layer; made by who can run the model."""

    @property
    def description(self) -> Mapping[str, Any]:
        """For the card: `text` (its name), `sha256` of its token ids, `n_seqs`, `n_tokens` of each."""
        ...

    @property
    def head_dim(self) -> int:
        """Of the model's attention: which columns of o_proj read which rows of v_proj."""
        ...

    def run(
        self, index: int, weights: Mapping[str, torch.Tensor], names: Collection[str], observe: Observe
    ) -> None:
        """Run layer `index` with these weights, by full tensor name, over all of the text. Moves nothing on.

        What the linears of `names` are given is observed, batch by batch; what follows the last of them in the
        layer is not computed.
        """
        ...

    def compare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        exact: Mapping[str, torch.Tensor],
        names: Collection[str],
        observe: Compare,
    ) -> None:
        """As `run`, beside the layer with its weights `exact` on the hidden states that exact layers have made.

        names: of linears, and of norms, which are given the residual stream.
        """
        ...

    def advance_exact(self, index: int, exact: Mapping[str, torch.Tensor]) -> None:
        """Let the exact hidden states be the output of layer `index` with its weights `exact`, before `advance`.

        A method that compares does it in every layer.
        """
        ...

    def advance(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Let the hidden states be the output of layer `index` with these weights."""
        ...

    def save(self, path: Path) -> None:
        """Write the hidden states, bit for bit."""
        ...

    def restore(self, path: Path) -> None:
        """Take the hidden states that `save` wrote. IntegrityError where they are not of this text."""
        ...


@dataclass(frozen=True)
class PreparedLayer:
    """weights: all tensors of the layer by full name, those to be quantized perhaps in float32, all others in the
    dtype that they came in. roundings: of the tensors to be quantized, by name.
    """

    weights: Mapping[str, torch.Tensor]
    roundings: Mapping[str, Rounding]


class Method(Protocol):
    """One way of choosing codes. Immutable."""

    @property
    def name(self) -> str:
        """rtn, hqq, awq, gptq."""
        ...

    @property
    def needs_data(self) -> bool:
        """Whether `prepare` needs a calibration."""
        ...

    def prepare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, "Scheme"],
        scale_dtype: torch.dtype,
        calibration: Calibration | None,
    ) -> PreparedLayer:
        """What to quantize of layer `index`, and how.

        weights: all its tensors, by full name. schemes: of those that are to be quantized. scale_dtype: the model's.
        One without data may be given any part of a layer.

        Raises:
            IntegrityError: inputs of a linear are not finite; it is named.
        """
        ...


@dataclass(frozen=True)
class WithoutData:
    """A method that rounds any tensor alone."""

    name: str
    rounding: Rounding
    needs_data: bool = False

    def prepare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, "Scheme"],
        scale_dtype: torch.dtype,
        calibration: Calibration | None,
    ) -> PreparedLayer:
        return PreparedLayer(weights, dict.fromkeys(schemes, self.rounding))
