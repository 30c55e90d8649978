"""Small files in the state directory that say when something happened to a model: it was used, or we pulled it.

    mistral/used/DIGEST      its time is that of the last use; in it are the model's directory and its number
    mistral/pulled/DIGEST    the same for a snapshot of the Hub's cache that we fetched, which other tools share

Where they cannot be written, nothing is recorded, and nothing else changes.
"""

import contextlib
import hashlib
import typing
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import platformdirs

Kind = Literal["used", "pulled"]


def leave(kind: Kind, directory: Path) -> None:
    """Record that it happens now."""
    stamp = _stamp(kind, directory)
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stamp.write_text(f"{directory.absolute()}\n{_number(directory)}\n", errors="surrogateescape")


def when(kind: Kind, directory: Path) -> datetime | None:
    """When it last happened, as far as is known."""
    try:
        return datetime.fromtimestamp(_stamp(kind, directory).stat().st_mtime, UTC)
    except OSError:
        return None


def is_of(kind: Kind, directory: Path) -> bool:
    """Whether it happened to this very directory, and not to one that had its name before."""
    try:
        said = _stamp(kind, directory).read_text(errors="surrogateescape").splitlines()
        return len(said) > 1 and said[1] == _number(directory)
    except OSError:
        return False


def _number(directory: Path) -> str:
    """What the file system knows a directory by; it may use the number again when that is gone."""
    return str(directory.stat().st_ino) if directory.exists() else ""


def drop(directory: Path) -> None:
    """Forget a model that is gone."""
    for kind in typing.get_args(Kind):
        with contextlib.suppress(OSError):
            _stamp(kind, directory).unlink()


def _stamp(kind: str, directory: Path) -> Path:
    digest = hashlib.sha256(str(directory.absolute()).encode(errors="surrogateescape")).hexdigest()
    return platformdirs.user_state_path("mistral") / kind / digest[:32]
