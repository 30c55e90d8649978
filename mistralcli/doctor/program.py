"""Which program the name `mistral` starts: OpenStack's workflow client has the same."""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mistralcli.doctor.findings import Context, Finding

_ALIAS = "mistral-cli"
_HEAD_BYTES = 4096
_OUR_PACKAGE = re.compile(rb"\bmistralcli\b")  # OpenStack's is mistralclient


def check_path(context: Context) -> Iterator[Finding]:
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    named = [shutil.which("mistral", path=folder) for folder in folders]
    found = list(dict.fromkeys(Path(path) for path in named if path))
    if not found:
        message = "this program is not on PATH, so that no shell finds it"
        yield Finding("mistral", "note", message, _how_to_start())
    elif _is_ours(found[0]):
        behind = f", before {', '.join(map(str, found[1:]))}" if found[1:] else ""
        yield Finding("mistral", "ok", f"{found[0]}{behind}")
    else:
        message = f"{found[0]} comes first on PATH and may be another program of that name"
        alias = f"{_ALIAS} is this program's other name" if shutil.which(_ALIAS) else _how_to_start()
        yield Finding("mistral", "note", message, f"if it is: {alias}")


def _how_to_start() -> str:
    script = Path(sysconfig.get_path("scripts"), "mistral")
    return (
        f"add {script.parent} to PATH" if script.exists() else f"start it as {sys.executable} -m mistralcli"
    )


def _is_ours(path: Path) -> bool:
    """Whether an executable is a script that names this package. One that starts such a script, as pyenv's, is not."""
    try:
        with path.open("rb") as file:
            return _OUR_PACKAGE.search(file.read(_HEAD_BYTES)) is not None
    except OSError:  # one may be allowed to run what one may not read
        return False
