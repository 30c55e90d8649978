"""A directory that appears complete or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import DiskError, UsageError

PARTIAL = ".partial"
CARD = "quantization_card.json"
"""Every build has one: what lacks it is never replaced."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged(destination: Path, *, needed_bytes: int, replace: bool) -> Iterator[Path]:
    """Yield a new directory, `destination` + ".partial", which takes its place on leaving without an error.

    On an error it is removed. A process that is killed leaves it; the next one for this destination empties it.

    Raises:
        UsageError: the destination exists, and `replace` is off or it is no build; or another process is making it.
        DiskError: there is no room for `needed_bytes`, or something cannot be written or read.
    """
    is_build = (destination / CARD).is_file()
    if destination.exists() and not (replace and is_build):
        what, hint = ("", ", or replace it with --force") if is_build else (" and is not a build", "")
        raise UsageError(f"{destination} exists already{what}", f"choose another name{hint}")
    partial = destination.with_name(destination.name + PARTIAL)
    with _disk_errors(destination, needed_bytes), _claimed(partial, destination):
        try:
            shutil.rmtree(_replaced(destination), ignore_errors=True)
            if free_bytes(partial) < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial
            _put_in_place(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _claimed(partial: Path, destination: Path) -> Iterator[None]:
    """Make `partial`, or empty the one that is there, locked against other processes; a killed one lets go."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise BlockingIOError  # the other process was done between our two calls
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    except BlockingIOError:
        raise UsageError(
            f"another process is making {destination}", "wait for it, or choose another name"
        ) from None
    finally:
        os.close(descriptor)


def free_bytes(directory: Path) -> int:
    """What an ordinary user may still write to the disk of `directory`."""
    return shutil.disk_usage(directory).free


@contextmanager
def _disk_errors(destination: Path, needed_bytes: int) -> Iterator[None]:
    """Failures to write, as DiskError with the numbers; and to read: those have the name of another file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _is_written(Path(error.filename), destination):
            raise DiskError(f"{error.filename} cannot be read: {error.strerror}") from error
        existing = next(parent for parent in destination.absolute().parents if parent.exists())
        if error.errno in _FULL:
            raise DiskError(
                f"no room for {destination}: {needed_bytes:,} bytes are needed, {free_bytes(existing):,} are free "
                f"({error.strerror})",
                "make room on that disk, or choose a directory on another with -o",
            ) from error
        raise DiskError(f"{destination} cannot be written: {error}") from error


def _put_in_place(partial: Path, destination: Path) -> None:
    """Make `partial` durable and rename it; a build that it replaces is removed last."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if destination.exists():
        destination.rename(_replaced(destination))
    partial.rename(destination)
    _sync(destination.parent)
    shutil.rmtree(_replaced(destination), ignore_errors=True)


def _is_written(path: Path, destination: Path) -> bool:
    """Whether a path belongs to what is made here: the build under any of its names, or a directory above it."""
    partial = destination.with_name(destination.name + PARTIAL)
    names = (destination, partial, _replaced(destination))
    return path in destination.parents or any(path.is_relative_to(name) for name in names)


def _replaced(destination: Path) -> Path:
    """Where a build is put while another takes its place."""
    return destination.with_name(f"{destination.name}.replaced{PARTIAL}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
