"""A directory that appears complete or not at all, and may be gone on with where its making was stopped."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import DiskError, MistralError, NotEnoughMemoryError, UsageError

PARTIAL = ".partial"
CARD = "quantization_card.json"
"""Every build has one: what lacks it is never replaced."""

FORMAT_VERSION = 1
"""Of builds, docs/format.md; a change that an older reader would misread increases it. Their cards state it."""

JOURNAL = "journal.jsonl"
"""What of a half-made build is done (`quant.journal`); a build that is complete loses it last of all."""

_PASSING_CODES = (3, 4, 5, DiskError.exit_code, NotEnoughMemoryError.exit_code)
"""Of errors that leave what is done as good as it was; 3 to 5 are the Hub's, whose classes are not known here."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged(destination: Path, *, needed_bytes: int, replace: bool, resume: bool = False) -> Iterator[Path]:
    """Yield a new directory, `destination` + ".partial", which takes its place on leaving without an error.

    On an error it is removed; but one that has a journal stays after Ctrl-C and where disk or memory ran out. A
    process that is killed leaves it as well. The next one for this destination empties it, or with `resume` takes
    it over as it is, if it has a journal.

    Raises:
        UsageError: the destination exists, and `replace` is off or it is no build; or another process is making it.
        DiskError: there is no room for `needed_bytes`, or something cannot be written or read.
    """
    if not destination.exists() and _replaced(destination).is_dir():
        # Another process was killed before the new one took its place.
        _replaced(destination).rename(destination)
    is_build = (destination / CARD).is_file()
    if destination.exists() and not (replace and is_build):
        what, hint = ("", ", or replace it with --force") if is_build else (" and is not a build", "")
        raise UsageError(f"{destination} exists already{what}", f"choose another name{hint}")
    partial = partial_of(destination)
    with _disk_errors(destination, needed_bytes), _claimed(partial, destination):
        try:
            if not (resume and (partial / JOURNAL).is_file()):
                _empty(partial)  # the journal first: it must not outlive what it tells of
            shutil.rmtree(_replaced(destination), ignore_errors=True)
            if free_bytes(partial) + _size_bytes(partial) < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial
            _put_in_place(partial, destination)
        except BaseException as error:
            if not (_is_worth_resuming(error) and (partial / JOURNAL).is_file()):
                (partial / JOURNAL).unlink(missing_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_of(destination: Path) -> Path:
    """Where a build is while it is being made."""
    return destination.with_name(destination.name + PARTIAL)


def can_be_resumed(destination: Path) -> bool:
    """Whether there is a half-made build of that name which `staged` would go on with."""
    return (partial_of(destination) / JOURNAL).is_file()


def finish_renamed(destination: Path) -> bool:
    """Take the journal away from a build that was complete and renamed when its process was killed; says if it was."""
    journal = destination / JOURNAL
    if not (journal.is_file() and (destination / CARD).is_file()):
        return False
    journal.unlink()
    shutil.rmtree(_replaced(destination), ignore_errors=True)
    return True


def _is_worth_resuming(error: BaseException) -> bool:
    """Whether the same command may succeed later, with nothing wrong in what is done already."""
    if isinstance(error, MistralError):
        return error.exit_code in _PASSING_CODES
    return isinstance(error, OSError | KeyboardInterrupt | MemoryError)


def _empty(directory: Path) -> None:
    (directory / JOURNAL).unlink(missing_ok=True)
    for leftover in directory.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _size_bytes(directory: Path) -> int:
    """What the files in it take on the disk, holes not counted."""
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


@contextmanager
def _claimed(partial: Path, destination: Path) -> Iterator[None]:
    """Make `partial`, or take the one that is there, locked against other processes; a killed one lets go."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise BlockingIOError  # the other process was done between our two calls
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
        go_on = "; what is done stays, and --resume goes on with it" if can_be_resumed(destination) else ""
        if error.errno in _FULL:
            raise DiskError(
                f"no room for {destination}: {needed_bytes:,} bytes are needed, {free_bytes(existing):,} are free "
                f"({error.strerror})",
                f"make room on that disk, or choose a directory on another with -o{go_on}",
            ) from error
        raise DiskError(f"{destination} cannot be written: {error}") from error


def _put_in_place(partial: Path, destination: Path) -> None:
    """Make `partial` durable and rename it; a build that it replaces is removed last, and before it the journal."""
    for path in (*partial.iterdir(), partial):
        sync(path)
    if destination.exists():
        destination.rename(_replaced(destination))
    partial.rename(destination)
    sync(destination.parent)
    (destination / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(_replaced(destination), ignore_errors=True)


def _is_written(path: Path, destination: Path) -> bool:
    """Whether a path belongs to what is made here: the build under any of its names, or a directory above it."""
    names = (destination, partial_of(destination), _replaced(destination))
    return path in destination.parents or any(path.is_relative_to(name) for name in names)


def _replaced(destination: Path) -> Path:
    """Where a build is put while another takes its place."""
    return destination.with_name(f"{destination.name}.replaced{PARTIAL}")


def sync(path: Path) -> None:
    """Have a file, or a directory's list of files, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
