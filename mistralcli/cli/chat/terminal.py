"""The terminal of a chat, by prompt_toolkit: editing, history across sessions, completion of commands."""

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session, get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.shortcuts import CompleteStyle

from mistralcli.cli import console
from mistralcli.cli.chat.commands import COMMANDS
from mistralcli.cli.chat.repl import is_open, run_repl
from mistralcli.cli.chat.state import SETTINGS, Chat, ChatState
from mistralcli.session import Session


def chat_at_terminal(session: Session, state: ChatState) -> None:
    """Chat with whoever sits at the terminal, as `run_repl` says; SIGTERM and SIGHUP leave too.

    The prompt is drawn on stderr when stdout is a file or a pipe, which then gets the answers alone.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with create_app_session(output=_output()):
        terminal = PromptTerminal(open_history(user_state_path("mistral") / "history"))
        run_repl(Chat(session, terminal), state)


def _output() -> Output:
    """prompt_toolkit writes escape sequences to a dumb terminal too, unless its output is plain."""
    if console.is_smart_terminal(sys.stdin):
        return create_output(always_prefer_tty=True)
    return PlainTextOutput(sys.stdout if console.is_terminal(sys.stdout) else sys.stderr)


def _leave(number: int, frame: FrameType | None) -> None:
    """An exception and not the end at once: prompt_toolkit puts the terminal back into its usual mode."""
    raise SystemExit(128 + number)


class PromptTerminal:
    """Reads with prompt_toolkit, and writes answers to stdout and notes to stderr (see `console`)."""

    def __init__(self, history: History) -> None:
        self._prompt: PromptSession[str] = PromptSession(
            [("", "\n"), ("ansigreen bold", ">>> ")],
            prompt_continuation=lambda width, line, n_wraps: "" if n_wraps else "... ",
            multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
            key_bindings=_key_bindings(),
            history=history,
            completer=ChatCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
        )

    def read(self, draft: str) -> str:
        """One input. Ctrl-C clears the line, and pressed again on the empty one raises KeyboardInterrupt.

        A dumb terminal could not show the draft, so it is not offered there.
        """
        text = draft if console.is_smart_terminal(sys.stdin) else ""
        cleared = False
        while True:
            try:
                return _encodable(self._prompt.prompt(default=text))
            except KeyboardInterrupt:
                if cleared and not self._prompt.default_buffer.text:
                    raise
            text, cleared = "", True
            self.note("(Ctrl-C again or Ctrl-D leaves)")

    def write(self, text: str) -> None:
        console.write_out(text)

    def note(self, message: str) -> None:
        console.note(message)


def _encodable(text: str) -> str:
    """`text` with a question mark for each byte that was typed or pasted and is not UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")  # which is what Alt-Enter sends
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


class ChatCompleter(Completer):
    """Completes the names of commands, of settings after /set, and of files where a command takes one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        command = COMMANDS.get(name.removeprefix("/")) if name.startswith("/") else None
        if not space and name.startswith("/"):
            yield from _beginning_with(name, [f"/{known}" for known in COMMANDS])
        elif command is COMMANDS["set"]:
            yield from _beginning_with(argument, SETTINGS)
        elif command is not None and command.argument == "FILE":
            yield from self._paths.get_completions(Document(argument), complete_event)


def _beginning_with(start: str, words: Iterable[str]) -> Iterable[Completion]:
    known = (word for word in words if word.startswith(start))
    return (Completion(f"{word} ", start_position=-len(start), display=word) for word in known)


class PrivateHistory(FileHistory):
    """Inputs in a file. A disk that is full is no reason to end a chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def open_history(path: Path) -> History:
    """The inputs of all sessions, in `path`, which only its owner can read; else those of this one."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
    except OSError as error:
        console.warn(f"no history is kept: {path} cannot be opened: {error.strerror}")
        return InMemoryHistory()
    return PrivateHistory(str(path))
