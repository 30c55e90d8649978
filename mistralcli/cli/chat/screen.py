"""The terminal beneath a chat: what answers are written to, whether keys are echoed, and when it is gone."""

import errno
import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, Protocol

from prompt_toolkit.application import Application, get_app_or_none
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.output.vt100 import Vt100_Output

from mistralcli.cli import console
from mistralcli.cli.chat.markdown import MarkdownStream

CLOSED = 128 + signal.SIGHUP
"""The exit code when the terminal is gone, whether or not a signal said so."""


class Stream(Protocol):
    """Where the pieces of one answer go."""

    def write(self, text: str) -> None: ...

    def close(self) -> None: ...


class RawStream:
    """The text as it is; a line that has no end gets one when the answer is over."""

    def __init__(self) -> None:
        self._at_line_start = True

    def write(self, text: str) -> None:
        if text:
            console.write_out(text)
            self._at_line_start = text.endswith("\n")

    def close(self) -> None:
        if not self._at_line_start:
            self.write("\n")


def answer_stream(*, plain: bool) -> Stream:
    """Rendered Markdown on a terminal that can show it, unless the user wants it plain; else the text alone."""
    if plain or not console.is_smart_terminal(sys.stdout):
        return RawStream()
    return MarkdownStream(_write_styled, width=_width, color=console.has_color(sys.stdout))


def _write_styled(text: str) -> None:
    """Text that `MarkdownStream` has made safe, with its own styles."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding, errors="backslashreplace"))
    sys.stdout.buffer.flush()


def _width() -> int:
    """Columns, asked for each time, since a window may be resized while an answer comes."""
    with suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    return 80


_ERASE_DOWN = "\x1b7\x1b[K\x1b[B\r\x1b[J\x1b8"
"""This line from the cursor on, then those below: all at once from the first row on, tmux keeps as scrolled away."""


def prompt_output() -> Output:
    """prompt_toolkit writes escape sequences to a dumb terminal too, unless its output is plain."""
    if console.is_smart_terminal(sys.stdin):
        output = create_output(always_prefer_tty=True)
        if "TMUX" in os.environ and isinstance(output, Vt100_Output):
            output.erase_down = partial(output.write_raw, _ERASE_DOWN)  # type: ignore[method-assign]
        return output
    return PlainTextOutput(sys.stdout if console.is_terminal(sys.stdout) else sys.stderr)


def prompt_input() -> Input:
    source = create_input(sys.stdin)
    if isinstance(source, Vt100Input):
        source.stdin_reader = _Reader(source.stdin_reader.stdin_fd, encoding=source.stdin.encoding)
    return source


class _Reader(PosixStdinReader):
    """prompt_toolkit takes an error of reading for nothing read, and would ask a closed terminal without end."""

    def read(self, count: int = 1024) -> str:
        if is_gone(self.stdin_fd):
            self.closed = True
        return super().read(count)


def is_gone(descriptor: int) -> bool:
    """Whether it is no terminal any more: its window was closed, or its connection broke."""
    try:
        termios.tcgetattr(descriptor)
    except termios.error:
        return True
    return False


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise SystemExit, once, and so does writing to a terminal that is gone.

    An exception and not the end at once: the conversation is saved, and the terminal put back into its usual mode.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        app = get_app_or_none()
        if app is None or not app.is_running or app.loop is None:
            raise SystemExit(128 + number)
        app.loop.call_soon_threadsafe(_end_prompt, app, 128 + number)  # raised here, asyncio would print it

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, leave)
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise SystemExit(CLOSED) from None


def _end_prompt(app: Application[Any], code: int) -> None:
    if app.is_running and app.future is not None and not app.future.done():
        app.exit(exception=SystemExit(code))


@contextmanager
def echo(wanted: bool) -> Iterator[None]:
    """In the block the terminal shows what is typed, or does not: while an answer comes, keys would be mixed into it.

    They are not lost, not even by Ctrl-C (NOFLSH): the next prompt shows them.
    """
    try:
        before = termios.tcgetattr(sys.stdin)
        modes = termios.tcgetattr(sys.stdin)
        modes[3] = modes[3] | termios.ECHO if wanted else (modes[3] & ~termios.ECHO) | termios.NOFLSH
        termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
    except (termios.error, ValueError):
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextmanager
def interrupts_after() -> Iterator[None]:
    """In the block Ctrl-C waits for its end, so that nothing is shown by half; then it raises KeyboardInterrupt."""
    came: list[int] = []
    with console.on_interrupt(lambda number, frame: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt
