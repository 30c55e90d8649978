"""Where the CPU's kernels are kept on disk as object code, so that a start that finds them compiles nothing.

An entry is a file: the SHA-256 of its own name and content, then the content. What is cut off, damaged or somebody
else's is not there. A folder holds what belongs together, as what makes code differ says: versions, processor, source.
Folders are beside Python's own bytecode (`__pycache__`, or where `PYTHONPYCACHEPREFIX` says), or in the user's cache
directory where that cannot be written.
"""

import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import platformdirs

from quant.whole_file import write_whole

_FOLDER = "kernels"
_UNUSED_S = 60 * 86400
"""A folder that no process has opened for so long goes when another is made: of an older version, as a rule."""

_OPENED_S = 86400
"""How exactly it is noted when one was opened."""


def places(package: Path) -> list[Path]:
    """Where the folders of kernels are whose source is in the directory `package`, best first."""
    beside = Path(importlib.util.cache_from_source(str(package / "_"))).parent
    return [beside / _FOLDER, platformdirs.user_cache_path("mistral") / _FOLDER]


class Folder:
    """The kernels of one package whose code is right where `circumstances` are what it says."""

    def __init__(self, package: Path, circumstances: str) -> None:
        name = hashlib.sha256(circumstances.encode()).hexdigest()[:32]
        self._paths = [place / name for place in places(package)]

    def is_there(self) -> bool:
        """Whether anything was ever kept in it."""
        # Path.is_dir raises where a directory may not be searched.
        return any(os.path.isdir(path) for path in self._paths)  # noqa: PTH112

    def read(self, name: str) -> bytes | None:
        """What was kept by that name, if it is whole and this user's or root's."""
        for path in self._paths:
            with suppress(OSError), (path / name).open("rb") as file:
                content = file.read()
                digest, code = content[:32], content[32:]
                if _is_trusted(file.fileno()) and digest == _digest(name, code):
                    _note_opened(path)
                    return code
        return None

    def write(self, name: str, code: bytes) -> None:
        """Keep it, whole or not at all, in the first place that takes it. Where none does, it is not kept."""
        for path in self._paths:
            with suppress(OSError):
                if not path.is_dir():
                    _remove_unused(path.parent)
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
                # What a crash of the machine cuts off fails its digest.
                write_whole(path / name, _digest(name, code) + code, durable=False)
                return


def _digest(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + code).digest()


def _is_trusted(descriptor: int) -> bool:
    """Code is run, so it must not be another user's, wherever an environment variable has a cache."""
    return not hasattr(os, "getuid") or os.fstat(descriptor).st_uid in (0, os.getuid())


def _note_opened(path: Path) -> None:
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _OPENED_S:
            os.utime(path)


def _remove_unused(place: Path) -> None:
    for folder in _folders(place):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(folder)


def _folders(place: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in place.iterdir() if path.is_dir() and not path.is_symlink())
