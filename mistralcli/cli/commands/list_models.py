"""`mistral list`: the models on this machine."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.tables import table

if TYPE_CHECKING:
    from mistralcli.inventory import StoredModel

_HEADER = ("NAME", "KIND", "SOURCE", "REVISION", "SCHEME", "SIZE", "LAST USED", "")


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """List the models on this machine: builds, and what was pulled from the Hub.

    What is broken or half-made is listed with what to do about it; it is never run.
    """
    from mistralcli import inventory

    models = inventory.list_models()
    if as_json:
        console.write_out(json.dumps([as_dict(model) for model in models]) + "\n")
    elif models:
        console.write_out(table([_HEADER, *(row(model) for model in models)]))
    else:
        console.note("no models here yet but the built-in `demo`; get one with: mistral pull OWNER/NAME")


def as_dict(model: "StoredModel") -> dict[str, Any]:
    """A model as --json prints it."""
    broken = model.broken
    return {
        "name": model.name,
        "kind": model.kind,
        "source": model.source,
        "revision": model.revision,
        "refs": list(model.refs),
        "scheme": model.scheme,
        "size_bytes": model.size_bytes,
        "path": str(model.path),
        "modified": model.modified.isoformat(),
        "last_used": model.used.isoformat() if model.used else None,
        "broken": broken.reason if broken else None,
        "remedy": broken.remedy if broken else None,
    }


def row(model: "StoredModel") -> tuple[str, ...]:
    """A model as a line of the table; the last cell says what is wrong with it, and what to do."""
    from mistralcli.units import size_text

    return (
        model.name,
        model.kind,
        (model.source or "-") if model.kind == "build" else "-",
        ",".join(model.refs) or (model.revision or "-")[:12],
        model.scheme or "-",
        size_text(model.size_bytes),
        model.used.astimezone().strftime("%Y-%m-%d %H:%M") if model.used else "never",
        f"broken: {model.broken.reason}; {model.broken.remedy}" if model.broken else "",
    )
