"""`mistral verify`: whether a model's files are what they should be."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.options import NamedModel
from mistralcli.errors import IntegrityError
from mistralcli.units import size_text

if TYPE_CHECKING:
    from mistralcli.verify import Verification


def verify(
    model: NamedModel,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")] = False,
) -> None:
    """Read a model's files and compare them with their hashes, its configuration and, for a build, its card.

    Hashes are known for builds and for what was pulled from the Hub. Ends with 9 where something is wrong.
    """
    from mistralcli import store
    from mistralcli.verify import verify as verify_files

    directory = store.resolve(model)
    with console.progress(f"verifying {model}", quiet=quiet) as update:
        found = verify_files(directory, update)
    if as_json:
        facts = {"model": model, "path": str(directory), "ok": not found.problems, **vars(found)}
        console.write_out(json.dumps(facts, ensure_ascii=False) + "\n")
    if found.problems:
        first, *rest = found.problems
        for problem in rest if not quiet else ():
            console.note(problem)
        more = f" (and {len(rest)} more)" if rest else ""
        raise IntegrityError(f"{model}: {first}{more}", "pull it again, or make the build again with --force")
    if not as_json:
        console.write_out(f"{model}: {_summary(found)}\n")


def _summary(found: "Verification") -> str:
    by = {"card": "those of its card", "hub": "those of the Hub"}.get(found.hashes_of or "")
    hashes = f"the hashes of {found.n_hashed} files are {by}" if by else "there are no hashes to compare with"
    return f"{hashes}; {found.n_tensors} tensors, {size_text(found.size_bytes)}, are whole and finite"
