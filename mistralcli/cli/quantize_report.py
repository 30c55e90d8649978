"""What `mistral quantize` says of a build: the plan before it is made, and the report after."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistralcli.cli.tables import table
from mistralcli.units import size_text

if TYPE_CHECKING:
    from quant.build_plan import BuildPlan
    from quant.checkpoint import BuildReport
    from quant.memory import Peak


@dataclass(frozen=True)
class Planned:
    """A build that could be made: its name and place, what it would hold, what it would take of memory and disk."""

    name: str
    directory: Path
    method: str
    plan: "BuildPlan"
    peak: "Peak"
    free_bytes: int


def plan_dict(planned: Planned) -> dict[str, Any]:
    """The plan as JSON. `size_bytes` is exact for all files but the card, of which `card_bytes` is a bound."""
    plan = planned.plan
    return {
        "name": planned.name,
        "directory": str(planned.directory),
        "method": planned.method,
        "size_bytes": plan.size_bytes,
        "card_bytes": plan.card_bytes,
        "files": plan.files,
        "bits_per_weight": _bits_per_weight(plan),
        "stored": _stored(plan),
        "peak_memory_bytes": {**vars(planned.peak), "total": planned.peak.total},
        "free_disk_bytes": planned.free_bytes,
    }


def plan_text(planned: Planned) -> str:
    """The plan as lines for people."""
    plan, peak = planned.plan, planned.peak
    stored = [
        (scheme, f"{entry['n_tensors']} tensors", size_text(entry["size_bytes"]))
        for scheme, entry in _stored(plan).items()
    ]
    parts = {key: size for key, size in vars(peak).items() if size and key not in ("sampling", "check")}
    memory = " + ".join(f"{key} {size_text(size)}" for key, size in parts.items())
    if peak.sampling:
        memory = f"text {size_text(peak.sampling)}; then {memory}"
    if peak.check:
        memory += f"; then the check {size_text(peak.check)}"
    files = [(name, f"{size:,}") for name, size in plan.files.items()]
    return "".join(
        (
            f"{planned.name} in {planned.directory}, by {planned.method}\n",
            f"size: {plan.size_bytes:,} bytes ({size_text(plan.size_bytes)}), and a card of less than "
            f"{size_text(plan.card_bytes)}; {size_text(planned.free_bytes)} are free\n",
            f"bits a quantized weight: {_bits_per_weight(plan):.3f}\n",
            f"peak memory: {size_text(peak.total)} ({memory})\n",
            table([("stored as", "", ""), *stored]),
            table([("file", "bytes"), *files]),
        )
    )


def _stored(plan: "BuildPlan") -> dict[str, Mapping[str, int]]:
    """By scheme, and `dense`: how many tensors of the source are stored so, and how large that is."""
    found: dict[str, dict[str, int]] = {}
    for tensor in plan.tensors:
        entry = found.setdefault(
            "dense" if tensor.scheme is None else tensor.scheme.name, {"n_tensors": 0, "size_bytes": 0}
        )
        entry["n_tensors"] += 1
        entry["size_bytes"] += tensor.stored_bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["size_bytes"]))


def _bits_per_weight(plan: "BuildPlan") -> float:
    from quant.card import bits_per_weight

    return bits_per_weight(tensor for tensor in plan.tensors if tensor.scheme is not None)


def summary(report: "BuildReport") -> str:
    """One line: size before and after, what is stored how, the largest error, how long it took.

    A scheme's groups may not divide the rows of every layer, so what was asked for is not all that there is.
    """
    stored = ", ".join(f"{count} in {name}" for name, count in report.n_layers_by_scheme.items())
    return (
        f"{size_text(report.size_before_bytes)} to {size_text(report.size_after_bytes)}, layers: {stored}, "
        f"{report.bits_per_weight:.2f} bits a quantized weight, "
        f"largest relative error {report.worst_error:.4f} ({report.worst_tensor}), {_checked(report.quality)}, "
        f"{report.seconds:.0f} s"
    )


def _checked(quality: Mapping[str, Any]) -> str:
    """What the card says of the check."""
    if quality["left_out"] is not None:
        return f"not checked ({quality['left_out']})"
    kl, perplexity = quality["kl"], quality["perplexity"]
    return (
        f"KL {kl['mean']:.4f} ± {kl['stderr']:.4f} nats a token, same likeliest token {quality['top1_agreement']:.1%}, "
        f"perplexity {perplexity['before']:.4g} to {perplexity['after']:.4g} on {quality['text']['name']}"
    )
