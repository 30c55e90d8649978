"""Files whose text goes with the next message."""

import re
from collections.abc import Sequence
from pathlib import Path

from mistralcli.cli.chat.state import Attachment
from mistralcli.errors import UsageError

MAX_FILE_BYTES = 4 * 2**20
"""Some million tokens, which no context here holds; larger files are refused unread."""


def read_attachment(path: Path) -> Attachment:
    """The text of a file, and its name in one line. Raises UsageError where that cannot go with a message."""
    try:
        if not path.is_file():
            raise UsageError(f"{path} is a directory" if path.is_dir() else f"there is no file {path}")
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise UsageError(
                f"{path} has {size_bytes:,} bytes, and a message takes files of up to {MAX_FILE_BYTES:,}"
            )
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise UsageError(f"{path} is not text: it has a zero byte")
    if not text.strip():
        raise UsageError(f"{path} is empty")
    return Attachment(" ".join(path.name.split()) or "file", text.strip("\n"))


def attached_line(attached: Sequence[Attachment]) -> str:
    """Which files go with the next message."""
    names = ", ".join(file.name for file in attached)
    return f"{names} {'goes' if len(attached) == 1 else 'go'} with the next message"


def with_attachments(attached: Sequence[Attachment], message: str) -> str:
    """The message behind the files, each under its name in a block of its own, as Markdown has it."""
    return "\n\n".join([*map(as_block, attached), message])


def as_block(file: Attachment) -> str:
    longest = max(map(len, re.findall("`+", file.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{file.name}:\n{fence}\n{file.text}\n{fence}"
