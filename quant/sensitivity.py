"""Which linears are worth 8 bits in a build of a given size: by what each loses at 4, for each byte that it saves.

Without data the loss of a weight is `‖w − ŵ‖²`; with calibration it is `‖x(w − ŵ)ᵀ‖² / ‖x wᵀ‖²` over some
`SAMPLE_TOKENS` of its inputs x. Both are measured with round to nearest. Squares add up over the linears of a set that
shares its bits, and over the sets, as long as their errors are independent.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from quant.build_plan import BuildPlan, Model, Recipe, adjustable, plan_build
from quant.errors import UsageError
from quant.keep import fused_sets, with_precision
from quant.linear import QuantizedLinear
from quant.method import Calibration
from quant.plan import Unit
from quant.scheme import Scheme
from quant.tiles import map_tiles
from quant.writing import error_and_norm, loaded, require_finite

SAMPLE_TOKENS = 512
_TILE_WEIGHTS = 1 << 19


class Measure:
    """Does one unit: of each tensor whose bits are to be decided, what it loses in the scheme asked for and at 8 bits.

    calibration: None to compare weights alone; else it is moved on, with the layers as they are in the source.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        calibration: Calibration | None,
        device: torch.device,
        on_read: Callable[[int], None],
    ) -> None:
        larger = with_precision(recipe.scheme, "8")
        assert larger is not None
        self._schemes = [recipe.scheme, larger]
        self._model, self._calibration = model, calibration
        self._device, self._on_read = device, on_read
        self._names = {f"{module}.weight" for module in adjustable(model, recipe)}

    def __call__(self, unit: Unit) -> dict[str, list[float] | None]:
        names = [tensor.name for tensor in unit.tensors if tensor.name in self._names]
        weights, inputs = {}, None
        if self._calibration is not None and unit.index is not None:
            weights = {tensor.name: self._model.source.load(tensor.name) for tensor in unit.tensors}
            inputs = sampled_inputs(self._calibration, unit.index, weights, names)
        losses: dict[str, list[float] | None] = dict.fromkeys((tensor.name for tensor in unit.tensors), None)
        for tensor in unit.tensors:
            if tensor.name in self._names:
                losses[tensor.name] = self._losses(tensor.name, inputs)
            self._on_read(tensor.spec.nbytes)
        if inputs is not None and self._calibration is not None and unit.index is not None:
            self._calibration.advance(unit.index, weights)
        weights.clear()
        self._model.source.release()
        return losses

    def _losses(self, name: str, inputs: Mapping[str, torch.Tensor] | None) -> list[float]:
        weight = self._model.source.load(name)
        require_finite(name, weight)
        weight = weight.to(self._device)
        if inputs is None:
            return weight_losses(weight, self._schemes, self._model.dtype)
        return output_losses(weight, inputs[name].to(self._device), self._schemes, self._model.dtype)


def weight_losses(weight: torch.Tensor, schemes: Sequence[Scheme], dtype: torch.dtype) -> list[float]:
    """`‖w − ŵ‖²` in each scheme."""
    return [error_and_norm(weight, _quantized(weight, scheme, dtype))[0] ** 2 for scheme in schemes]


def output_losses(
    weight: torch.Tensor, inputs: torch.Tensor, schemes: Sequence[Scheme], dtype: torch.dtype
) -> list[float]:
    """`‖x(w − ŵ)ᵀ‖² / ‖x wᵀ‖²` in each scheme; inputs: x, (n_tokens, in_features)."""
    return [_output_loss(weight, _quantized(weight, scheme, dtype), inputs.float()) for scheme in schemes]


def _quantized(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedLinear:
    fitting = scheme.for_in_features(weight.shape[1])
    return loaded(fitting, weight, fitting.quantize(weight, dtype))


def _output_loss(weight: torch.Tensor, linear: QuantizedLinear, inputs: torch.Tensor) -> float:
    def squares(rows: slice) -> tuple[float, float]:
        tile = weight[rows].float()
        difference = linear.dense_rows(rows.start, rows.stop) - tile
        return float((inputs @ difference.T).square().sum()), float((inputs @ tile.T).square().sum())

    tiles = map_tiles(squares, len(weight), max(1, _TILE_WEIGHTS // weight.shape[1]), weight.device)
    lost, total = (sum(values) for values in zip(*tiles, strict=True))
    return float(lost / (total or 1.0))


def sampled_inputs(
    calibration: Calibration, index: int, weights: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """What the linears of `names` are given in a layer: some `SAMPLE_TOKENS` rows of each, from all of the text."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    n_tokens = calibration.description["n_seqs"] * calibration.description["n_tokens"]
    step = max(1, n_tokens // SAMPLE_TOKENS)

    def keep(name: str, inputs: torch.Tensor) -> None:
        parts[name].append(inputs[::step].clone())

    calibration.run(index, weights, names, keep)
    return {name: torch.cat(found) for name, found in parts.items()}


def pick_larger(model: Model, recipe: Recipe, losses: Mapping[str, Sequence[float] | None]) -> BuildPlan:
    """The build of at most the recipe's target size in which 8 bits are where they gain most for a byte.

    losses: by the name of a tensor, as `Measure` gives them.

    The smallest build has that size (`check_target`).
    """
    assert recipe.target_bytes is not None
    modules = adjustable(model, recipe)
    smallest, largest = plan_build(model, recipe), plan_build(model, recipe, modules)
    stored = [{tensor.module: tensor.stored_bytes for tensor in plan.tensors} for plan in (smallest, largest)]

    def gain(members: Sequence[str]) -> float:
        found = [losses[f"{module}.weight"] or (0.0, 0.0) for module in members]
        lost = sum(small - large for small, large in found)
        return lost / max(1, sum(stored[1][module] - stored[0][module] for module in members))

    chosen, plan = set[str](), smallest
    for members in sorted(fused_sets(modules), key=gain, reverse=True):
        wider = plan_build(model, recipe, chosen | set(members))
        if wider.size_bytes + wider.card_bytes <= recipe.target_bytes:
            chosen, plan = chosen | set(members), wider
    return plan


def check_target(smallest: BuildPlan, largest: BuildPlan, target_bytes: int) -> None:
    """UsageError where not even the smallest build has that size; those of the smallest and the largest are named."""
    least, most = (plan.size_bytes + plan.card_bytes for plan in (smallest, largest))
    if target_bytes < least:
        raise UsageError(
            f"no build has at most {target_bytes:,} bytes: the smallest has {least:,}, the largest {most:,}",
            "raise --target-size, or allow fewer bits with --keep",
        )
