"""`mistral du`: what takes how much of the disk."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.tables import table
from mistralcli.units import size_text

if TYPE_CHECKING:
    from mistralcli.disk_usage import Usage

_HEADER = ("KIND", "NAME", "SIZE", "WHERE", "")


def du(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """Show what takes how much of the disk: builds, pulled models, chats, compiled kernels."""
    from mistralcli.disk_usage import disk_usage

    usages = disk_usage()
    if as_json:
        console.write_out(json.dumps([as_dict(usage) for usage in usages]) + "\n")
        return
    total = sum(usage.size_bytes for usage in usages if usage.ours)
    rows = [_row(usage) for usage in usages] + [("total", "of what is ours", size_text(total), "", "")]
    console.write_out(table([_HEADER, *rows]))


def as_dict(usage: "Usage") -> dict[str, Any]:
    """A row as --json prints it."""
    paths = [str(path) for path in usage.paths]
    return {
        "kind": usage.kind,
        "name": usage.name,
        "size_bytes": usage.size_bytes,
        "ours": usage.ours,
        "paths": paths,
    }


def _row(usage: "Usage") -> tuple[str, ...]:
    where = usage.paths[0] if len(usage.paths) == 1 else usage.paths[0].parent
    return (
        usage.kind,
        usage.name,
        size_text(usage.size_bytes),
        str(where),
        "" if usage.ours else "shared with other tools",
    )
