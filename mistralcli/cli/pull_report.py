"""What `mistral pull --dry-run` prints of a plan: as text, and as JSON."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from mistralcli.cli.tables import table
from mistralcli.pull_plan import Fit, PullPlan, Weights
from mistralcli.units import size_text

_LONGEST_QUOTE = 200
_MOST_NAMES = 4
_GATED = {"auto": "yes: access is granted as soon as its conditions are accepted"}
_GATED_BY_HAND = "yes: its owner decides who gets access"


def as_dict(plan: PullPlan) -> dict[str, Any]:
    """The plan as --json prints it."""
    weights = plan.weights
    return {
        "model": plan.source.repo_id,
        "revision": plan.source.commit,
        "licence": plan.source.licence,
        "gated": plan.source.gated,
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "here_bytes": plan.here[file.name]}
            for file in plan.chosen
        ],
        "left_out": [
            {"name": one.file.name, "size_bytes": one.file.size_bytes, "reason": one.reason}
            for one in plan.left_out
        ],
        "fetch_bytes": plan.fetch_bytes,
        "here_bytes": plan.here_bytes,
        "disk": {"path": str(plan.place), "needed_bytes": plan.fetch_bytes, "free_bytes": plan.free_bytes},
        "builds": None
        if weights is None
        else {name: {"size_bytes": n} for name, n in weights.builds.items()},
        "no_builds": None if weights is None else weights.no_builds,
        "devices": None if weights is None else [vars(fit) for fit in weights.fits],
    }


def as_text(plan: PullPlan) -> str:
    """The plan as lines. Names, licence and reasons are foreign: they are escaped where they are written."""
    facts = [
        ("model", f"{plan.source.repo_id} at {plan.source.commit[:12]}"),
        ("licence", _one_line(plan.source.licence or "its card states none")),
        ("gated", _GATED.get(plan.source.gated, _GATED_BY_HAND) if plan.source.gated else "no"),
        ("fetch", f"{size_text(plan.fetch_bytes)}, and {size_text(plan.here_bytes)} are here already"),
        ("disk", _disk(plan)),
    ]
    parts = [table(facts), "files\n" + _indented(table([*_files(plan)]))]
    if plan.left_out:
        parts.append("left out\n" + _indented(table([*_left_out(plan)])))
    if plan.weights is not None:
        parts += _builds(plan.weights)
    return "".join(parts)


def _disk(plan: PullPlan) -> str:
    enough = "" if plan.fetch_bytes <= plan.free_bytes else ": too little"
    return f"{size_text(plan.fetch_bytes)} needed, {size_text(plan.free_bytes)} free at {plan.place}{enough}"


def _files(plan: PullPlan) -> Iterator[tuple[str, ...]]:
    for file in plan.chosen:
        here = plan.here[file.name]
        note = "here" if here == file.size_bytes else f"{size_text(here)} of it here" if here else ""
        yield file.name, size_text(file.size_bytes), note


def _left_out(plan: PullPlan) -> Iterator[tuple[str, ...]]:
    """A line for each class of reasons."""
    for reason, group in groupby(sorted(plan.left_out, key=lambda one: one.reason), lambda one: one.reason):
        files = [one.file for one in group]
        names = ", ".join(file.name for file in files[:_MOST_NAMES])
        more = f" and {len(files) - _MOST_NAMES} more" if len(files) > _MOST_NAMES else ""
        yield reason, size_text(sum(file.size_bytes for file in files)), names + more


def _builds(weights: Weights) -> Iterator[str]:
    """What builds would take, and a line for each device with a column for each of them."""
    if weights.no_builds:
        yield f"no builds: {weights.no_builds}\n"
    else:
        sizes = [f"{size_text(size_bytes)} as {name}" for name, size_bytes in weights.builds.items()]
        yield f"builds: {' or '.join(sizes)}\n"
    names = list(dict.fromkeys(fit.build for fit in weights.fits))
    rows = [("runs on", *names)]
    for _, group in groupby(weights.fits, lambda fit: fit.device):
        fits = list(group)
        rows.append((f"{fits[0].device} ({size_text(fits[0].free_bytes)} free)", *map(_verdict, fits)))
    yield table(rows)


def _verdict(fit: Fit) -> str:
    if fit.ctx is None:
        return f"no: {size_text(fit.needed_bytes)} needed"
    return f"{fit.ctx:,} tokens in {size_text(fit.needed_bytes)}"


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _one_line(text: str) -> str:
    """Foreign text of any length and shape as a short line."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_QUOTE else line[: _LONGEST_QUOTE - 1] + "…"
