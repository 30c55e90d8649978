"""What of a half-made build is done, so that another process can go on with it and the bytes be the same.

A file of JSON lines in the build's directory. The first one holds the settings: all that the build's bytes follow
from. Each other one is written and flushed to the disk after the bytes that it speaks of; one that was cut off by
the end of its process is as good as none.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import UsageError
from quant.staging import JOURNAL, partial_of

Record = Mapping[str, Any]


class Journal:
    """The journal of the build that is made in `directory`, an empty one where there is none yet."""

    def __init__(self, directory: Path, settings: Record) -> None:
        self._path = directory / JOURNAL
        self._settings = dict(settings)
        found, self._whole_bytes = _read(self._path)
        self.records = found[1:]
        """What was recorded before, without the settings, oldest first."""

    def add(self, record: Record) -> None:
        """Have `record` on the disk when this returns, and with the first one the settings."""
        new = [record] if self._whole_bytes else [self._settings, record]
        data = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in new).encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(self._whole_bytes)
            file.seek(self._whole_bytes)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        self._whole_bytes += len(data)


def check_settings(destination: Path, settings: Record) -> None:
    """UsageError, naming the first difference, where a half-made build of that name was begun with other settings."""
    found, _ = _read(partial_of(destination) / JOURNAL)
    if not found:
        return
    before = found[0]
    for key in (*settings, *before):
        if before.get(key) != settings.get(key):
            raise UsageError(
                f"{destination} was begun with {key} {_shown(before.get(key))}, not {_shown(settings.get(key))}",
                "resume with the settings it was begun with, or start over without --resume",
            )


def _shown(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and how many bytes they take."""
    records: list[dict[str, Any]] = []
    size_bytes = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            return records[:-1], size_bytes
        size_bytes += len(line)
    return records, size_bytes
