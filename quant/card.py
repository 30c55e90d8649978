"""`quantization_card.json`: where a build comes from, what was done to it, and what was lost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quant.build_plan import Recipe
from quant.method import Calibration
from quant.plan import PlannedTensor
from quant.quality import LeftOut, Quality
from quant.staging import FORMAT_VERSION


@dataclass(frozen=True)
class Gate:
    """The quality gate: no tensor's relative error may exceed `max_error`, nor the mean `kl` on a text `max_kl`.

    `kl`, in nats a token, is None where it was not measured.
    """

    max_error: float
    worst_tensor: str
    worst_error: float
    max_kl: float
    kl: float | None = None

    @staticmethod
    def of_card(card: Mapping[str, Any]) -> "Gate":
        """The verdict that a build's card has."""
        names = (field.name for field in fields(Gate))
        return Gate(**{name: card["gate"][name] for name in names if name in card["gate"]})

    @property
    def errors_passed(self) -> bool:
        return self.worst_error <= self.max_error

    @property
    def passed(self) -> bool:
        return self.errors_passed and (self.kl is None or self.kl <= self.max_kl)


def gate(errors: Mapping[str, float], max_error: float, max_kl: float) -> Gate:
    """The tensor that lost most, and whether that is too much; nothing is known of the KL yet."""
    worst = max(errors, key=errors.__getitem__)
    return Gate(max_error, worst, errors[worst], max_kl)


def bits_per_weight(tensors: Iterable[PlannedTensor]) -> float:
    """Stored bits, scales and all, per weight."""
    tensors = list(tensors)
    return 8 * sum(tensor.stored_bytes for tensor in tensors) / sum(tensor.n_weights for tensor in tensors)


def card(
    source: Mapping[str, Any],
    recipe: Recipe,
    calibration: Calibration | None,
    planned: Sequence[PlannedTensor],
    errors: Mapping[str, float],
    verdict: Gate,
    quality: Quality | LeftOut,
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """The card as JSON; docs/format.md explains each value. `errors`: relative ones of the quantized tensors.

    files: size and sha256 of all files of the build but the card.
    """
    schemes = {tensor.name: tensor.scheme for tensor in planned if tensor.scheme is not None}
    return {
        "format_version": FORMAT_VERSION,
        "source": source,
        "scheme": recipe.scheme.name,
        "method": recipe.method.name,
        "calibration": None if calibration is None else dict(calibration.description),
        "keep": [str(rule) for rule in recipe.keep],
        "target_size_bytes": recipe.target_bytes,
        "size_bytes": {
            "before": sum(tensor.spec.nbytes for tensor in planned),
            "after": sum(tensor.stored_bytes for tensor in planned),
        },
        "bits_per_weight": {
            "quantized": bits_per_weight(tensor for tensor in planned if tensor.scheme is not None),
            "all": bits_per_weight(planned),
        },
        "gate": {**vars(verdict), "passed": verdict.passed},
        "quality": quality.for_card(),
        "files": files,
        "tensors": {
            name: {"scheme": scheme.name, "relative_error": errors[name]} for name, scheme in schemes.items()
        },
    }
