"""Makes docs/screens: what six screens look like, taken from a real terminal (tmux) and written as SVG by Rich.

    python docs/make_screens.py CHECKPOINT

CHECKPOINT is a small chat model, for the screens that the built-in one cannot fill: those in docs/screens are of
SmolLM2-135M-Instruct as a Mistral checkpoint. It needs tmux and takes some minutes. Nothing is edited: what stands in a
picture is what the terminal held. The program runs as of a user whose home is `HOME`, which is made and removed.
"""

import io
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parent.parent
SCREENS = REPOSITORY / "docs" / "screens"
HOME = Path("/tmp/mistral-screens")
COLUMNS = 100
SHELL_IS_READY = r"(^|\n)\$$"
CHAT_IS_READY = r"\n>>>\s*\n[^\n]* left[^\n]*$"
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Screen:
    """What is typed, and what the end of the screen looks like when that is done."""

    name: str
    title: str
    typed: tuple[tuple[str, str], ...]
    rows: int = 70  # of the terminal; a chat has a line at its bottom


def shell(*commands: str) -> tuple[tuple[str, str], ...]:
    return tuple((command, SHELL_IS_READY) for command in commands)


def chat(start: str, *inputs: str) -> tuple[tuple[str, str], ...]:
    return tuple((line, CHAT_IS_READY) for line in (start, *inputs))


ALL = (
    Screen(
        "run",
        "mistral run: one prompt, in pipes too",
        shell(
            'mistral run -t 0 "Tell me a story about a fox."',
            "echo 'Tell me a story about a dog.' | mistral run -t 0 -m demo | wc --words",
            "mistral run -m demo --regex '(yes|no), (because|but) [a-z ]{10,40}\\.' --seed 1 \"Is the sky blue?\"",
        ),
    ),
    Screen(
        "chat-markdown",
        "mistral chat: an answer in Markdown, as it came",
        chat(
            "mistral chat ./smollm2 -t 0",
            "Write a Python function that checks whether a number is even, and explain it.",
        ),
        rows=24,
    ),
    Screen(
        "chat-tree",
        "mistral chat: another answer, the branches, and the context's tokens",
        chat(
            "mistral chat demo --max-tokens 40",
            "Tell me a story about a cat.",
            "/retry",
            "/branch",
            "/tokens",
        ),
        rows=34,
    ),
    Screen(
        "quantize",
        "mistral quantize and show: a build and its card",
        shell("mistral quantize ./smollm2 -o smollm2-int4 --group-size 64", "mistral show smollm2-int4"),
    ),
    Screen("bench", "mistral bench: how fast a build is here", shell("mistral bench -m smollm2-int4")),
    Screen(
        "list-doctor",
        "mistral list and doctor: what is here, and what works",
        shell("mistral list", "mistral doctor --offline"),
    ),
)


class Terminal:
    """A shell in a terminal of tmux, of its own server."""

    def __init__(self, name: str, rows: int) -> None:
        self._server = f"mistral-{name}"
        self._tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(rows), " ".join(_shell_command()))
        self._wait_for(SHELL_IS_READY)

    def type(self, line: str, until: str) -> None:
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")
        time.sleep(1)  # for the line that is typed to be taken
        self._wait_for(until)

    def screen(self) -> str:
        """What the terminal shows, with SGR codes."""
        return self._tmux("capture-pane", "-e", "-p").rstrip("\n")

    def close(self) -> None:
        """End it, and before it a chat, which would still write into `HOME` when its terminal is gone."""
        if re.search(CHAT_IS_READY, self._tmux("capture-pane", "-p").rstrip()):
            self.type("/exit", SHELL_IS_READY)
        self._tmux("kill-server")

    def _wait_for(self, end: str) -> None:
        """Wait until the screen ends so and stays as it is for a second."""
        limit, before = time.monotonic() + TIMEOUT_S, ""
        while time.monotonic() < limit:
            time.sleep(1)
            text = self._tmux("capture-pane", "-p")
            if text == before and re.search(end, text.rstrip()):
                return
            before = text
        sys.exit(f"the screen did not end with {end!r} in {TIMEOUT_S:.0f} s:\n{before}")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._server, "-f", "/dev/null", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _shell_command() -> list[str]:
    """A shell whose environment has nothing of ours."""
    environment = {
        "HOME": str(HOME),
        "PATH": f"{HOME}/.venv/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": f"{HOME}/src",
        "LANG": "C.UTF-8",
        "TERM": "screen-256color",
        "PS1": "'$ '",
        "HISTFILE": "",
    }
    return [
        "cd",
        str(HOME),
        "&&",
        "env",
        "-i",
        *(f"{k}={v}" for k, v in environment.items()),
        "bash",
        "--norc",
    ]


def make_home(checkpoint: Path) -> None:
    """A home with this program and the model in it."""
    HOME.mkdir()
    (HOME / "src").symlink_to(REPOSITORY)
    (HOME / "smollm2").symlink_to(checkpoint.resolve())
    (HOME / ".venv" / "bin").mkdir(parents=True)
    (HOME / ".venv" / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (HOME / ".venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    (HOME / ".venv" / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    program = HOME / ".venv" / "bin" / "mistral"
    program.write_text(f"#!{HOME}/.venv/bin/python\nfrom mistralcli.__main__ import main\n\nmain()\n")
    program.chmod(0o755)


def compile_kernels() -> None:
    """Have them in the home's cache, so that no picture's times are those of a compiler."""
    terminal = Terminal("kernels", rows=24)
    try:
        for line, until in shell("mistral run -m demo hi", "mistral run -m ./smollm2 --max-tokens 8 hi"):
            terminal.type(line, until)
    finally:
        terminal.close()


def svg_of(screen: Screen, text: str) -> str:
    """The picture of a screen, which loads nothing from anywhere."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in text.splitlines():
        console.print(Text.from_ansi(line), no_wrap=True, crop=False)
    svg = console.export_svg(title=screen.title, unique_id=f"mistral-{screen.name}")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_home(Path(sys.argv[1]))
    SCREENS.mkdir(exist_ok=True)
    try:
        compile_kernels()
        for screen in ALL:
            terminal = Terminal(screen.name, screen.rows)
            try:
                for line, until in screen.typed:
                    terminal.type(line, until)
                (SCREENS / f"{screen.name}.svg").write_text(
                    svg_of(screen, terminal.screen()), encoding="utf-8"
                )
            finally:
                terminal.close()
    finally:
        shutil.rmtree(HOME)


if __name__ == "__main__":
    main()
