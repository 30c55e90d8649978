"""Which program the name `mistral` starts: OpenStack's workflow client has the same."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mistralcli.doctor.findings import Context, Finding

_ALIAS = "mistral-cli"
_HEAD_BYTES = 4096


def check_path(context: Context) -> Iterator[Finding]:
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    named = [shutil.which("mistral", path=folder) for folder in folders]
    found = list(dict.fromkeys(Path(path) for path in named if path))
    others = [path for path in found if not _is_ours(path)]
    for path in others:
        first = " and comes first" if path == found[0] else ""
        yield Finding(
            "mistral",
            "note",
            f"{path} is another program of that name on PATH{first}",
            f"{_ALIAS} is this program's other name",
        )
    if others == found:
        yield Finding(
            "mistral", "note", "this program is not on PATH, so that no shell finds it", _how_to_start()
        )
    elif not others:
        yield Finding("mistral", "ok", str(found[0]))


def _how_to_start() -> str:
    script = Path(sysconfig.get_path("scripts"), "mistral")
    return (
        f"add {script.parent} to PATH" if script.exists() else f"start it as {sys.executable} -m mistralcli"
    )


def _is_ours(path: Path) -> bool:
    """Whether an executable is a script that starts this package, from whichever installation."""
    with path.open("rb") as file:
        return b"mistralcli" in file.read(_HEAD_BYTES)
