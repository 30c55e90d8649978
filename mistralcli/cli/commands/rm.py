"""`mistral rm`: delete a model from this machine, after asking."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from mistralcli.store import StoredModel


def rm(
    model: Annotated[
        str, typer.Argument(metavar="MODEL[@REVISION]", help="A name that `mistral list` shows.")
    ],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a model from this machine: a build, or what was pulled from the Hub.

    Without @REVISION all revisions of a pulled model go; files that another revision shares stay.
    """
    from mistralcli import store
    from mistralcli.units import size_text

    found = store.find(model)
    size = size_text(sum(one.size_bytes for one in found))
    what = f"{model} ({f'{len(found)} revisions, ' if len(found) > 1 else ''}{size}){_also(model, found)}"
    if not yes and not _confirmed(f"remove {what}?"):
        console.note("nothing was removed")
        raise typer.Exit(1)
    for one in found:
        store.remove(one)
    console.note(f"removed {what}")


def _also(model: str, found: "list[StoredModel]") -> str:
    """The other branches and tags that name the one commit which is to go."""
    repository, at, revision = model.partition("@")
    others = [f"{repository}@{ref}" for one in found for ref in one.refs if at and ref != revision]
    return f", which is also {' and '.join(others)}" if others else ""


def _confirmed(question: str) -> bool:
    """Ask on the terminal; only `y` or `yes` is yes.

    Raises:
        UsageError: there is no terminal to ask on.
    """
    if not console.is_terminal(sys.stdin):
        raise UsageError(
            "there is no terminal to ask on before removing", "add --yes to remove without asking"
        )
    print(console.printable(f"{question} [y/N] "), end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
