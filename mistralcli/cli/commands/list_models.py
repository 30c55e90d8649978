"""`mistral list`: the models on this machine."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console

if TYPE_CHECKING:
    from mistralcli.store import StoredModel

_HEADER = ("NAME", "KIND", "REVISION", "SCHEME", "SIZE", "MODIFIED", "")


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """List the models on this machine: builds, and what was pulled from the Hub."""
    from mistralcli import store

    models = store.list_models()
    if as_json:
        console.write_out(json.dumps([as_dict(model) for model in models]) + "\n")
    elif models:
        console.write_out(table([_HEADER, *(row(model) for model in models)]))
    else:
        console.note("no models here yet but the built-in `demo`; get one with: mistral pull OWNER/NAME")


def as_dict(model: "StoredModel") -> dict[str, Any]:
    """A model as --json prints it."""
    return {
        "name": model.name,
        "kind": model.kind,
        "revision": model.revision,
        "refs": list(model.refs),
        "scheme": model.scheme,
        "size_bytes": model.size_bytes,
        "path": str(model.path),
        "modified": model.modified.isoformat(),
        "broken": model.broken,
    }


def row(model: "StoredModel") -> tuple[str, ...]:
    """A model as a line of the table; the last cell says what is wrong with it."""
    from mistralcli.units import size_text

    at = ",".join(model.refs) or (model.revision or "-")[:12]
    modified = model.modified.astimezone().strftime("%Y-%m-%d %H:%M")
    broken = f"broken: {model.broken}" if model.broken else ""
    return (model.name, model.kind, at, model.scheme or "-", size_text(model.size_bytes), modified, broken)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as text in columns two spaces apart, without spaces at the ends of lines."""
    cells = [[console.printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(line.rstrip() + "\n" for line in lines)
