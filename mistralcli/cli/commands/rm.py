"""`mistral rm`: delete models from this machine, after asking."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.completion import stored_names
from mistralcli.errors import UsageError
from mistralcli.units import size_text

if TYPE_CHECKING:
    from mistralcli.inventory import StoredModel


def rm(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL[@REVISION]",
            help="A name that `mistral list` shows.",
            autocompletion=stored_names,
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="All builds, leftovers and compiled kernels, and all that we pulled."),
    ] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a model from this machine: a build, or what was pulled from the Hub.

    Without @REVISION all revisions of a pulled model go; files that another revision shares stay.
    With --all, models in the Hub's cache that another tool fetched stay, and so do chats and settings.
    """
    if everything == (model is not None):
        raise UsageError("name a model, or everything with --all", "`mistral list` shows the models")
    if model is None:
        _remove_all(yes)
    else:
        _remove_one(model, yes)


def _remove_one(model: str, yes: bool) -> None:
    from mistralcli import inventory
    from mistralcli.disk_usage import freed_bytes

    found = inventory.find(model)
    for one in found:
        inventory.require_idle(one)
    size = size_text(freed_bytes(found))
    what = f"{model} ({f'{len(found)} revisions, ' if len(found) > 1 else ''}{size}){_also(model, found)}"
    _confirm(f"remove {what}?", yes)
    for one in found:
        inventory.remove(one)
    console.note(f"removed {what}")


def _remove_all(yes: bool) -> None:
    """Everything of ours that can be made or fetched again, and nothing else's."""
    from mistralcli import disk_usage, inventory

    models = [model for model in inventory.list_models() if inventory.is_ours(model)]
    others = [
        usage for usage in disk_usage.disk_usage() if usage.ours and usage.kind in ("leftovers", "kernels")
    ]
    if not models and not others:
        console.note("there is nothing to remove")
        return
    for model in models:
        inventory.require_idle(model)
        name = model.name if model.kind == "build" else f"{model.name}@{(model.revision or '')[:12]}"
        console.note(f"  {name}  {size_text(model.size_bytes)}")
    for usage in others:
        console.note(f"  {usage.kind}: {usage.name}  {size_text(usage.size_bytes)}")
    size = size_text(disk_usage.freed_bytes(models) + sum(usage.size_bytes for usage in others))
    _confirm(f"remove all of these ({size})? Chats, settings and what other tools fetched stay.", yes)
    for model in models:
        inventory.remove(model)
    for usage in others:
        disk_usage.remove(usage)
    console.note(f"removed {size}")


def _also(model: str, found: "list[StoredModel]") -> str:
    """The other branches and tags that name the one commit which is to go."""
    repository, at, revision = model.partition("@")
    others = [f"{repository}@{ref}" for one in found for ref in one.refs if at and ref != revision]
    return f", which is also {' and '.join(others)}" if others else ""


def _confirm(question: str, yes: bool) -> None:
    """Ask on the terminal, unless `yes`; only `y` or `yes` is yes, and anything else ends the program.

    Raises:
        UsageError: there is no terminal to ask on.
    """
    if yes:
        return
    if not console.is_terminal(sys.stdin):
        raise UsageError(
            "there is no terminal to ask on before removing", "add --yes to remove without asking"
        )
    print(console.printable(f"{question} [y/N] "), end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        console.note("nothing was removed")
        raise typer.Exit(1)
