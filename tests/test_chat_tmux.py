"""`mistral chat` in a real terminal emulator (tmux), with the built-in model: what a user sees on the screen."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

STORY = "Tell me a story about a fox."
PROMPT = re.compile(r"^>>> ?$", re.MULTILINE)
USED = re.compile(r"[1-9][\d,]* of 2,048 tokens")
"""What the toolbar shows after an answer."""


@dataclass(frozen=True)
class Screen:
    """A tmux server with one window, in which a shell runs the chat and then says its exit code."""

    socket: str
    directory: Path

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self.socket, "-f", "/dev/null", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    def text(self, *options: str) -> str:
        """What is shown, with all that has scrolled away, lines that the terminal broke joined."""
        return self.tmux("capture-pane", "-p", "-J", "-S", "-", *options)

    def wait(self, wanted: str | re.Pattern[str], *options: str) -> str:
        """The screen when it shows what is wanted."""
        pattern = re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted
        end = time.monotonic() + 60
        while time.monotonic() < end:
            shown = self.text(*options)
            if pattern.search(shown):
                return shown
            time.sleep(0.05)
        raise AssertionError(f"{pattern.pattern} is not on the screen:\n{self.text()}")

    def session(self) -> list[dict[str, object]]:
        """The events of the only session."""
        (path,) = (self.directory / "data" / "mistral" / "sessions").glob("*.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def chat(tmp_path) -> Iterator[Callable[..., Screen]]:
    """Start `mistral chat demo` in a new window; the same directories each time, so that a chat can be continued."""
    screens: list[Screen] = []

    def start(*options: str, size: tuple[int, int] = (80, 24), **environment: str) -> Screen:
        screen = Screen(f"mistral-{os.getpid()}-{tmp_path.name}-{len(screens)}", tmp_path)
        screens.append(screen)
        ours = {f"XDG_{name}_HOME": str(tmp_path / name.lower()) for name in ("STATE", "DATA", "CONFIG")}
        ours |= {"HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)} | environment
        unset = ["-u", "NO_COLOR", "-u", "MISTRAL_CLI_MODEL"]
        pairs = [f"{name}={value}" for name, value in ours.items()]
        chat = ["env", *unset, *pairs, sys.executable, "-m", "mistralcli", "chat", *options]
        shell = 'stty -a > "$0"; "$@"; echo "code $?"; stty -a > "$0.after"; exec cat'
        columns, rows = map(str, size)
        where = ["-d", "-x", columns, "-y", rows, "-c", str(tmp_path)]
        screen.tmux("new-session", *where, "sh", "-c", shell, str(tmp_path / "modes"), *chat)
        return screen

    yield start
    for screen in screens:
        command = ["tmux", "-L", screen.socket, "kill-server"]
        subprocess.run(command, capture_output=True, check=False, timeout=30)


def test_what_is_typed_while_the_model_loads_is_answered_and_toolbar_and_menu_go_away(chat, tmp_path):
    screen = chat("demo", "-t", "0")
    screen.wait(re.compile(r"^>>>", re.MULTILINE))
    screen.type(STORY)
    assert f">>> {STORY}" in screen.wait("2,048 tokens")
    screen.keys("Enter")
    shown = screen.wait(USED)
    assert re.search(r"^demo \(int4-g128\) on cpu, context 2048, weights .*MB\)$", shown, re.MULTILINE)
    assert "fox" in shown.split(STORY)[1]
    assert "loading" not in shown and shown.count(STORY) == 1
    screen.type("/s")
    screen.keys("Tab")
    screen.wait("/sessions")
    screen.keys("C-c")
    screen.wait("Ctrl-D leaves")
    screen.keys("C-d")
    shown = screen.wait("code 0").split(STORY)[1]
    assert "tokens" not in shown and "/sessions" not in shown
    assert (tmp_path / "modes").read_text() == (tmp_path / "modes.after").read_text()


def test_ctrl_c_and_a_resize_while_streaming_lose_no_text(chat):
    screen = chat("demo", "-t", "0", "--plain", size=(120, 24))
    screen.wait("2,048 tokens")
    screen.type(STORY)
    screen.keys("Enter")
    screen.wait(re.compile(re.escape(STORY) + r"\n\w+ \w+"))
    screen.tmux("resize-window", "-x", "70", "-y", "20")
    screen.keys("C-c")
    screen.wait(USED)
    shown = screen.text()
    answer = next(event["content"] for event in screen.session() if event.get("role") == "assistant")
    assert isinstance(answer, str)
    assert answer.split() == shown.split(STORY)[1].split("(stopped)")[0].split(">>>")[0].split()
    screen.type("next")
    screen.tmux("resize-window", "-x", "100", "-y", "24")
    assert screen.wait(">>> next").count(">>> next") == 1


def test_5000_pasted_lines_are_one_message_that_can_still_be_edited(chat, tmp_path):
    screen = chat("demo", "-t", "0")
    screen.wait("2,048 tokens")
    lines = [f"line {i} of a long text that somebody pastes" for i in range(5000)]
    (tmp_path / "pasted").write_text("\n".join(lines))
    screen.tmux("load-buffer", str(tmp_path / "pasted"))
    screen.tmux("paste-buffer", "-p")
    screen.wait(lines[-1])
    screen.type(" and edits")
    screen.wait(f"{lines[-1]} and edits")
    screen.keys("Enter")
    shown = screen.wait("does not fit")
    assert "Traceback" not in shown
    draft = next(event["text"] for event in screen.session() if event["event"] == "draft")
    assert draft == "\n".join(lines) + " and edits"


@pytest.mark.parametrize("kill", ["kill-pane", "kill-server"])
def test_a_chat_whose_terminal_is_killed_goes_on(chat, kill):
    screen = chat("demo", "-t", "0", "--plain")
    screen.wait("2,048 tokens")
    screen.type(STORY)
    screen.keys("Enter")
    screen.wait(re.compile(re.escape(STORY) + r"\n\w+ \w+"))
    screen.tmux(kill)
    end = time.monotonic() + 30
    while not any(event.get("role") == "assistant" for event in screen.session()):
        assert time.monotonic() < end
        time.sleep(0.05)
    answer = next(event for event in screen.session() if event.get("role") == "assistant")
    screen = chat("-c", "-t", "0", "--plain")
    screen.wait("demo (int4-g128) on cpu")
    screen.type("/tokens")
    screen.keys("Enter")
    assert " ".join(str(answer["content"]).split()[:3]) in screen.wait(STORY)


def test_a_dumb_terminal_gets_its_prompt_when_the_model_is_there_and_no_escapes(chat):
    screen = chat("demo", "-t", "0", "-n", "20", TERM="dumb")
    screen.wait(PROMPT)
    screen.type(STORY)
    screen.keys("Enter")
    shown = screen.wait("(cut off")
    assert "on cpu" in shown
    assert "tokens used" not in shown
    assert not re.search(r"\x1b|\[\?2004|\[0m", screen.text("-e"))


def test_no_color_shows_no_colour_and_still_a_toolbar(chat):
    screen = chat("demo", "-t", "0", "-n", "20", NO_COLOR="1")
    screen.wait("2,048 tokens")
    screen.type(STORY)
    screen.keys("Enter")
    screen.wait(USED)
    styles = re.findall(r"\x1b\[([0-9;]*)m", screen.text("-e"))
    assert styles
    assert not [style for style in styles if re.search(r"(^|;)(3[0-7]|38|4[0-8]|9\d|10\d)(;|$)", style)]


@pytest.mark.parametrize(
    ("editor", "typed", "shown"),
    [
        ("sh -c 'echo edited >> \"$0\"'", "kept", "... edited"),
        ("sh -c 'exit 3'", "kept", "ended with exit code 3, so the text is as it was"),
    ],
)
def test_ctrl_g_edits_in_the_users_editor_and_a_failing_one_keeps_the_text(chat, editor, typed, shown):
    screen = chat("demo", VISUAL=editor)
    screen.wait("2,048 tokens")
    screen.type(typed)
    screen.wait(f">>> {typed}")
    screen.keys("C-g")
    screen.wait(shown)
    screen.wait(f">>> {typed}")
