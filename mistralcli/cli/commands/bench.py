"""`mistral bench`: how fast a model runs here, and whether it was faster before."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import load_session
from mistralcli.cli.options import KV, Chunk, Ctx, Device, DType, Exact, MemoryLimit, Model, Slack, Threads
from mistralcli.cli.tables import table
from mistralcli.errors import UsageError
from mistralcli.units import size_text

if TYPE_CHECKING:
    from mistralcli.bench import BenchOptions

Speeds = dict[tuple[str, int], float]
"""Tokens a second by what was measured, "prefill" or "decode", and the length of the prompt or the position."""

_HEADER = ("", "TOKENS", "TOKENS/S", "READ A TOKEN", "OF BANDWIDTH")
_AGAINST_HEADER = ("BEFORE", "CHANGE")
_LENGTHS = {"prefill": "n_tokens", "decode": "position"}


def bench(
    model: Model = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Shorter and less often: the demo in seconds on a CPU.")
    ] = False,
    prompts: Annotated[
        list[int] | None,
        typer.Option("-p", "--prompt-tokens", min=1, help="Pre-fill a prompt so long (several times)."),
    ] = None,
    positions: Annotated[
        list[int] | None,
        typer.Option("-d", "--depth", min=1, help="Decode behind so many tokens (several times)."),
    ] = None,
    n_tokens: Annotated[
        int | None, typer.Option("-n", "--tokens", min=2, help="Decode so many tokens in a run.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("-r", "--repeats", min=1, help="Take medians of so many runs.")
    ] = None,
    ctx: Ctx = None,
    chunk: Chunk = None,
    slack: Slack = None,
    device: Device = None,
    dtype: DType = None,
    memory_limit: MemoryLimit = None,
    kv: KV = None,
    threads: Threads = None,
    exact: Exact = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="Compare with an earlier --json.")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")] = False,
) -> None:
    """Measure how fast a model runs here: pre-fill, decoding, memory, and its share of the memory's bandwidth.

    Decoding reads all weights for each token, so the bandwidth bounds it. Each figure is a median of several runs.
    """
    before = None if against is None else read_report(against)
    from mistralcli.bench import default_options, read_bandwidth, run_bench
    from mistralcli.device import choose_device
    from mistralcli.run_options import SessionOptions

    options = SessionOptions(ctx, chunk, slack, device, dtype, memory_limit, kv, threads, exact)
    where = choose_device(device)
    # A GPU has room for it now; a CPU gets its threads with the model.
    read = read_bandwidth(where, memory_limit) if where.type == "cuda" else None
    session = load_session(model, options, quiet)
    chosen = _chosen(default_options(where, quick), prompts, positions, n_tokens, repeats)
    refuse_too_long(session.max_seq_len, prompts or (), positions or (), n_tokens, chosen.n_tokens)
    report = run_bench(session, chosen, _silent if quiet else _say_step, read).as_dict()
    if before is not None and not quiet:
        _warn_of_other_conditions(report, before)
    if as_json:
        changes = {} if before is None else {"against": _changes(report, before)}
        console.write_out(json.dumps(report | changes, ensure_ascii=False) + "\n")
    else:
        _show(report, before)
    if not quiet and any(row["bandwidth_share"] > 1 for row in report["decode"]):
        console.note(
            "more than 100%: what a step reads lies in the processor's caches, which are faster than memory"
        )


def _chosen(
    options: "BenchOptions",
    prompts: list[int] | None,
    positions: list[int] | None,
    n_tokens: int | None,
    repeats: int | None,
) -> "BenchOptions":
    return replace(
        options,
        prompts=prompts or options.prompts,
        positions=positions or options.positions,
        n_tokens=n_tokens or options.n_tokens,
        repeats=repeats or options.repeats,
    )


def refuse_too_long(
    ctx: int, prompts: Sequence[int], positions: Sequence[int], n_asked: int | None, n_tokens: int
) -> None:
    """Raise UsageError for a length that was asked for and does not fit; lengths of our own give way to the context."""
    if n_asked is not None and n_asked > max(2, ctx // 2):
        raise UsageError(
            f"runs of {n_asked} tokens are longer than half of the context of {ctx}",
            "ask for a longer --ctx, or fewer --tokens",
        )
    for n_prompt in prompts:
        if n_prompt >= ctx:
            raise UsageError(
                f"a prompt of {n_prompt} tokens and one behind it do not fit into a context of {ctx}",
                "ask for a longer --ctx, or a shorter --prompt-tokens",
            )
    for position in positions:
        if position + n_tokens > ctx:
            raise UsageError(
                f"{n_tokens} tokens behind {position} do not fit into a context of {ctx}",
                "ask for a longer --ctx, or a lower --depth or --tokens",
            )


def _say_step(step: str) -> None:
    console.note(f"measuring {step}")


def _silent(step: str) -> None:
    """What --quiet says."""


def read_report(path: Path) -> dict[str, Any]:
    """What an earlier run printed. Raises UsageError where it is something else."""
    try:
        report = json.loads(console.decoded(path.read_bytes(), str(path)))
        speeds(report)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "make one with: mistral bench --json > FILE"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UsageError(
            f"{path} is no report of mistral bench", "make one with: mistral bench --json > FILE"
        ) from None
    return dict(report)


def speeds(report: dict[str, Any]) -> Speeds:
    """All tokens a second of a report."""
    return {
        (kind, int(row[length])): float(row["tokens_per_s"])
        for kind, length in _LENGTHS.items()
        for row in report[kind]
    }


def _changes(report: dict[str, Any], before: dict[str, Any]) -> dict[str, dict[str, float]]:
    """New by old tokens a second, where both were measured."""
    old, new = speeds(before), speeds(report)
    common = [key for key in new if old.get(key, 0) > 0]
    return {
        kind: {str(n): new[kind, n] / old[kind, n] for which, n in common if which == kind}
        for kind in _LENGTHS
    }


def _warn_of_other_conditions(report: dict[str, Any], before: dict[str, Any]) -> None:
    for key in ("model", "device_name", "dtype", "ctx", "chunk"):
        if before.get(key) != report[key]:
            console.warn(f"{key} was {before.get(key)}, and is {report[key]}")


def _show(report: dict[str, Any], before: dict[str, Any] | None) -> None:
    """The report as lines and a table, which is Rich's on a terminal."""
    console.write_out(
        f"{report['model']} on {report['device_name']}, computing in {report['dtype']}, context {report['ctx']}, "
        f"torch {report['versions']['torch']}\n"
    )
    rows = _rows(report, before)
    if console.is_smart_terminal(sys.stdout):
        _show_rich(rows)
    else:
        console.write_out(table(rows))
    console.write_out(
        f"loaded in {report['load_s']:.2f} s; memory at most {size_text(report['peak_bytes'])}, of which weights "
        f"{size_text(report['weights_bytes'])} and cache {size_text(report['cache_bytes'])}; a plain read gets "
        f"{size_text(int(report['read_bytes_per_s']))}/s\n"
    )


def _rows(report: dict[str, Any], before: dict[str, Any] | None) -> list[tuple[str, ...]]:
    rows = [
        ("pre-fill", str(row["n_tokens"]), _speed(row["tokens_per_s"]), "", "") for row in report["prefill"]
    ]
    rows += [
        (
            "decode",
            str(row["position"]),
            _speed(row["tokens_per_s"]),
            size_text(row["bytes_per_token"]),
            f"{row['bandwidth_share']:.0%}",
        )
        for row in report["decode"]
    ]
    if before is None:
        return [_HEADER, *rows]
    old = speeds(before)
    compared = [
        row + _comparison(new, old.get(key))
        for row, (key, new) in zip(rows, speeds(report).items(), strict=True)
    ]
    return [_HEADER + _AGAINST_HEADER, *compared]


def _comparison(new: float, old: float | None) -> tuple[str, str]:
    return (_speed(old), f"{new / old - 1:+.1%}") if old else ("-", "-")


def _speed(tokens_per_s: float) -> str:
    """With three digits at least.

    >>> [_speed(speed) for speed in (0.1234, 5.678, 567.8, 37612.3)]
    ['0.123', '5.68', '568', '37,612']
    """
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 99.95 else f"{tokens_per_s:#.3g}"


def _show_rich(rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *body = rows
    shown = Table(*map(str.lower, header))
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in body:
        shown.add_row(*map(Text, row))
    Console(no_color=not console.has_color(sys.stdout)).print(shown)
