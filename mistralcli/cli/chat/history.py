"""What was typed in all chats, in a file that only its owner can read."""

import os
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from mistralcli.cli import console


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
