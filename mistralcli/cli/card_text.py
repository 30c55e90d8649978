"""A build's `quantization_card.json` as lines for people. It may be anybody's: what is missing or odd is left out."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeGuard

from mistralcli.units import size_text

Rows = list[tuple[str, str]]


def card_rows(card: Mapping[str, Any], *, each_tensor: bool) -> Rows:
    """Names and values: where the build comes from, what was done, what was lost, by kind of tensor or by tensor."""
    values = _Values(card)
    rows = [
        ("source", values.text("source.name") + _after("@", values.text("source.revision"))),
        ("method", _after("", values.text("method")) + _after(", ", values.text("scheme"))),
        ("calibration", values.text("calibration.text")),
        ("bits a weight", _bits(values)),
        ("tensors", _sizes(values)),
        ("gate", _gate(values)),
        ("text", _text(values)),
        ("perplexity", _change(values, "perplexity.before", "perplexity.after")),
        ("KL", _kl(values)),
        ("same likeliest token", _share(values.number("quality.top1_agreement"))),
        ("not checked", values.text("quality.left_out")),
    ]
    return [(name, value) for name, value in rows if value] + _errors(values, each_tensor)


class _Values:
    """The card's values by their names with dots, as far as they are what they should be."""

    def __init__(self, card: Mapping[str, Any]) -> None:
        self._card = card

    def _at(self, name: str) -> Any:
        found: Any = self._card
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def text(self, name: str) -> str:
        found = self._at(name)
        return found if isinstance(found, str) else ""

    def number(self, name: str) -> float | None:
        found = self._at(name)
        return found if _is_number(found) else None

    def table(self, name: str) -> Mapping[str, Any]:
        found = self._at(name)
        return found if isinstance(found, dict) else {}


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that can be written: JSON also has NaN, Infinity and integers without end."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _after(separator: str, text: str) -> str:
    return f"{separator}{text}" if text else ""


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _change(values: _Values, before: str, after: str) -> str:
    numbers = [values.number(f"quality.{name}") for name in (before, after)]
    return "" if None in numbers else " to ".join(map(_number, numbers))


def _bits(values: _Values) -> str:
    quantized, whole = (values.number(f"bits_per_weight.{name}") for name in ("quantized", "all"))
    return "" if quantized is None else f"{quantized:.3f} of the quantized ones, {_number(whole)} of all"


def _sizes(values: _Values) -> str:
    before, after = (values.number(f"size_bytes.{name}") for name in ("before", "after"))
    return "" if before is None or after is None else f"{size_text(int(before))} to {size_text(int(after))}"


def _gate(values: _Values) -> str:
    gate = values.table("gate")
    if not gate:
        return ""
    outcome = "passed" if gate.get("passed") is True else "FAILED"
    worst, most = (_number(values.number(f"gate.{name}")) for name in ("worst_error", "max_error"))
    found = f"{outcome}: error {worst} of at most {most} ({values.text('gate.worst_tensor')})"
    kl = values.number("gate.kl")
    return found if kl is None else f"{found}, KL {kl:.4g} of at most {_number(values.number('gate.max_kl'))}"


def _text(values: _Values) -> str:
    name = values.text("quality.text.name")
    n_tokens, window = (values.number(f"quality.text.{key}") for key in ("n_tokens", "window"))
    sha256 = values.text("quality.text.sha256")
    return name and f"{name}, {_number(n_tokens)} tokens in windows of {_number(window)}, sha256 {sha256}"


def _kl(values: _Values) -> str:
    if not values.table("quality.kl"):
        return ""
    mean, stderr, median, p99, largest = (
        _number(values.number(f"quality.kl.{name}")) for name in ("mean", "stderr", "median", "p99", "max")
    )
    return f"{mean} ± {stderr} nats a token, median {median}, 99th percentile {p99}, largest {largest}"


def _errors(values: _Values, each_tensor: bool) -> Rows:
    """Relative errors, by tensor or by its kind, which is the last part of its module's name."""
    found: dict[str, list[float]] = defaultdict(list)
    for tensor, entry in values.table("tensors").items():
        error = entry.get("relative_error") if isinstance(entry, dict) else None
        if _is_number(error):
            name = tensor if each_tensor else tensor.removesuffix(".weight").rpartition(".")[2]
            found[name].append(float(error))
    return [(f"error of {name}", _spread(errors)) for name, errors in found.items()]


def _spread(errors: list[float]) -> str:
    if len(errors) == 1:
        return f"{errors[0]:.4f}"
    return f"{statistics.fmean(errors):.4f} on average, {min(errors):.4f} to {max(errors):.4f}"
