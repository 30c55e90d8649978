"""`mistral alias`: other names for models."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import warn_if_missing
from mistralcli.cli.completion import model_names
from mistralcli.cli.tables import table
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

_HEADER = ("ALIAS", "MODEL", "FROM", "")


def alias(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The other name.")] = None,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="The model that it is to mean.", autocompletion=model_names),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias NAME.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """Give a model another name, remove one, or list all. They are kept in the user's settings file."""
    if name is None and not remove:
        return _list(as_json)
    if name is None or (model is None) != remove or as_json:
        raise UsageError(
            "that is no change of an alias",
            "mistral alias NAME MODEL, mistral alias --remove NAME, or mistral alias to list all",
        )
    return _remove(name) if model is None else _add(name, model)


def _list(as_json: bool) -> None:
    from mistralcli import store
    from mistralcli.settings import aliases

    known = sorted(aliases().values(), key=lambda one: one.name)
    if as_json:
        entries = [{"name": one.name, "model": one.model, "source": str(one.file.path)} for one in known]
        console.write_out(json.dumps(entries, ensure_ascii=False) + "\n")
    elif known:
        notes = {True: "not used: a model has this name"}
        rows = [
            (one.name, one.model, str(one.file.path), notes.get(store.gives_way(one), "")) for one in known
        ]
        console.write_out(table([_HEADER, *rows]))
    else:
        console.note("no aliases yet; make one with: mistral alias NAME MODEL")


def _add(name: str, model: str) -> None:
    from mistralcli import store
    from mistralcli.settings import edit_user_file

    target = store.alias_target(name, model)

    def change(document: "TOMLDocument") -> None:
        document.setdefault("aliases", {})[name] = target

    path = edit_user_file(change)
    console.note(f"{name} now means {target}, in {path}")
    warn_if_missing(name)


def _remove(name: str) -> None:
    from mistralcli.settings import edit_user_file, read_file, user_path

    path = user_path()
    if not path.exists() or name not in read_file(path).aliases:
        raise UsageError(
            f"{path} has no alias {name}", "`mistral alias` lists them, and where they come from"
        )

    def change(document: "TOMLDocument") -> None:
        del document["aliases"][name]

    edit_user_file(change)
    console.note(f"{name} is no alias any more")
