"""The boundary to the terminal: data goes to stdout raw, everything said about it goes to stderr.

Text that came from a model, a file or the network passes through `printable` before it reaches a terminal,
and never through markup. Into a pipe it goes unchanged (`write_out`).
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol, TextIO

from mistralcli.errors import MistralError, UsageError

# C0 controls but tab and newline, DEL, C1 controls; bidi embeddings, overrides and isolates; lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Update(Protocol):
    """Reports progress; the total may change on the way. Fits `on_progress(done_bytes, total_bytes)`."""

    def __call__(self, done_bytes: int, total_bytes: int | None = None) -> None: ...


def printable(text: str) -> str:
    r"""`text` with every character that could command or deceive a terminal shown as `\x1b` or `\u202e`.

    Newlines and tabs stay. Works character by character, so pieces of a stream can be given as they come.
    """
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is an open terminal (Python sets a standard stream that is closed to None)."""
    return stream is not None and not stream.closed and stream.isatty()


def is_smart_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal that understands cursor movement, which TERM=dumb denies."""
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def has_color(stream: TextIO | None) -> bool:
    """Whether what is written to `stream` may be coloured: a terminal that can show it, unless NO_COLOR is set."""
    return is_smart_terminal(stream) and not os.environ.get("NO_COLOR")


def note(message: str) -> None:
    """Say `message` on stderr, as one line of its own. Where nobody can hear it, that is no error."""
    if sys.stderr is not None:  # else print would take stdout
        with suppress(OSError):
            print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say on stderr that something is not as the user may think."""
    note(f"warning: {message}")


def error_text(error: MistralError) -> str:
    """What failed and, on a second line, what to do about it; a newline in a name begins no other line."""
    lines = [f"error: {error.message}"] + ([f"hint: {error.hint}"] if error.hint else [])
    return "\n".join(line.replace("\n", "\\n") for line in lines)


def show_error(error: MistralError) -> None:
    """Say on stderr what failed and what to do about it."""
    note(error_text(error))


def write_out(text: str) -> None:
    """Write `text` to stdout now: escaped on a terminal, else unchanged and in UTF-8 whatever the locale.

    Raises BrokenPipeError when nobody reads any more; `mistralcli.cli.app.main` turns it into exit code 141.
    """
    write_styled([(text, "")], sys.stdout)


def write_styled(parts: Iterable[tuple[str, str]], stream: TextIO) -> None:
    """Write pieces of text as `write_out` does, each with its style where the stream may be coloured.

    A style is what stands between `ESC [` and `m` ("1;32"), or nothing.
    """
    shown, color = is_terminal(stream), has_color(stream)
    text = "".join(
        _styled(printable(text) if shown else text, style if color else "") for text, style in parts
    )
    data = text.encode(stream.encoding, "backslashreplace") if shown else text.encode("utf-8", "replace")
    stream.flush()  # what was printed before comes first
    stream.buffer.write(data)
    stream.buffer.flush()


def _styled(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style else text


def read_in() -> str:
    """All of stdin as UTF-8 text. Raises UsageError when it is something else."""
    return decoded(sys.stdin.buffer.read(), "standard input")


def decoded(data: bytes, source: str) -> str:
    """`data` as UTF-8 text, line ends as they are, without a byte order mark. Raises UsageError naming `source`."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8 text (byte {error.start})", "convert it first, for example with iconv"
        ) from None


@contextmanager
def on_interrupt(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let Ctrl-C call `handler` while the block runs, unless whoever started the program had it ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(description: str, total_bytes: int | None = None, *, quiet: bool = False) -> Iterator[Update]:
    """A progress bar on stderr while the block runs, when that is a terminal; gives `update(done_bytes)`.

    In the block Ctrl-C raises KeyboardInterrupt, so that nothing half-made stays.
    """
    with _shown(description, total_bytes, quiet, in_bytes=True) as update:
        yield update


@contextmanager
def steps(description: str, *, quiet: bool = False) -> Iterator[Update]:
    """As `progress`, for work that is counted in steps and not in bytes."""
    with _shown(description, None, quiet, in_bytes=False) as update:
        yield update


@contextmanager
def _shown(description: str, total: int | None, quiet: bool, *, in_bytes: bool) -> Iterator[Update]:
    with on_interrupt(signal.default_int_handler):
        if quiet or not is_smart_terminal(sys.stderr):
            yield _no_update
        else:
            with _bar(description, total, in_bytes=in_bytes) as update:
                yield update


@contextmanager
def _bar(description: str, total: int | None, *, in_bytes: bool) -> Iterator[Update]:
    from rich import progress as rich_progress
    from rich.console import Console

    counted: tuple[rich_progress.ProgressColumn, ...] = (
        (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
        if in_bytes
        else (rich_progress.TaskProgressColumn(),)
    )
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        *counted,
        rich_progress.TimeRemainingColumn(),
    )
    # stdout stays as it is: Rich would send to stderr what is printed there meanwhile.
    with rich_progress.Progress(
        *columns, console=Console(stderr=True), redirect_stdout=False, transient=True
    ) as bar:
        task = bar.add_task(printable(description), total=total)

        def update(done_bytes: int, total_bytes: int | None = None) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield update


def _no_update(done_bytes: int, total_bytes: int | None = None) -> None:
    """Nobody is watching."""
