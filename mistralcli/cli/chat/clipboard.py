"""The clipboard: through the desktop's own program, and through the terminal, which may be on another machine."""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

from mistralcli.cli import console
from mistralcli.errors import MistralError

MAX_TERMINAL_BYTES = 74_994
"""Of text; xterm and tmux drop a sequence (OSC 52) that is longer than 100,000 characters."""

_PROGRAM_S = 5.0


def copy_text(text: str) -> str:
    """Put `text` into the clipboard by every way there is, and say by which. MistralError where there is none."""
    data = text.encode("utf-8", errors="replace")
    program = _program(os.environ)
    ways = [program[0]] if program is not None and _ran(program, data) else []
    if console.is_smart_terminal(sys.stderr) and len(data) <= MAX_TERMINAL_BYTES:
        sys.stderr.write(osc52(data))
        sys.stderr.flush()
        ways.append("the terminal, if it takes OSC 52")
    if not ways:
        raise MistralError(
            f"there is no way to the clipboard for {len(text):,} characters",
            "install wl-copy, xclip or pbcopy, or write them to a file with /export",
        )
    return f"copied {len(text):,} characters by {' and '.join(ways)}"


def osc52(data: bytes) -> str:
    """What asks a terminal to put `data` into the clipboard; Base64, so nothing in it commands the terminal."""
    return f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\x07"


def _program(environment: Mapping[str, str]) -> list[str] | None:
    """The first of the desktops' programs that is here and has a desktop."""
    known = [
        (["pbcopy"], sys.platform == "darwin"),
        (["wl-copy"], bool(environment.get("WAYLAND_DISPLAY"))),
        (["xclip", "-selection", "clipboard"], bool(environment.get("DISPLAY"))),
    ]
    return next((command for command, fits in known if fits and shutil.which(command[0])), None)


def _ran(command: list[str], data: bytes) -> bool:
    """Whether it took the text. xclip stays behind to serve it, so its output is nothing to wait for."""
    try:
        done = subprocess.run(
            command, input=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_PROGRAM_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
