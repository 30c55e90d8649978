"""The user's own editor for a message: `$VISUAL`, else `$EDITOR`, else one that is here."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mistralcli.cli import console
from mistralcli.errors import MistralError, UsageError

_USUAL = ("sensible-editor", "nano", "vi")
_WHICH = "set $VISUAL or $EDITOR to another editor"


def edit_text(text: str) -> str | None:
    """`text` as it is saved in the editor, None when it is unchanged. The terminal must be in its usual mode.

    Raises:
        MistralError: the editor cannot be started, or says by its exit code that it failed.
        UsageError: there is none, or what it saved is not UTF-8.
    """
    command = _command()
    with tempfile.TemporaryDirectory(prefix="mistral-") as directory:  # which only its owner can enter
        path = Path(directory) / "message.md"
        path.write_text(f"{text}\n", encoding="utf-8", errors="replace")
        _run(command, path)
        try:
            edited = console.decoded(path.read_bytes(), "what the editor saved")
        except OSError as error:
            raise MistralError(f"what the editor saved cannot be read: {error.strerror}") from None
    edited = edited.replace("\r\n", "\n").removesuffix("\n")
    return None if edited == text else edited


def _command() -> list[str]:
    stated = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not stated:
        found = next(filter(shutil.which, _USUAL), None)
        if found is None:
            raise UsageError("there is no editor here", "set $VISUAL or $EDITOR to one")
        return [found]
    try:
        return shlex.split(stated)
    except ValueError:
        raise UsageError(f"the editor {stated!r} is no command: a quote is not closed", _WHICH) from None


def _run(command: list[str], path: Path) -> None:
    """Where answers go into a file, the editor is on stderr, as the prompt is."""
    screen = None if console.is_terminal(sys.stdout) else sys.stderr
    try:
        code = subprocess.run([*command, str(path)], stdout=screen, check=False).returncode
    except OSError as error:
        raise MistralError(f"the editor {command[0]} cannot be started: {error.strerror}", _WHICH) from None
    if code:
        how = f"with exit code {code}" if code > 0 else f"by signal {-code}"
        raise MistralError(f"the editor {command[0]} ended {how}, so the text is as it was")
