"""Sessions on disk: each chat in a file of its own, written as it goes, in `$XDG_DATA_HOME/mistral/sessions`.

A file has an event a line (`events.py`): first {"event": "session", "version": 1, "started": TIME, "model": NAME}; then
what changed, flushed to the disk after every step; and while an answer comes {"event": "piece", "text": TEXT} once a
second, which the whole answer replaces. Whatever ends the process, at most the last line is torn, and that is left out.

Who writes a file holds a lock on it, so another chat that goes on with the same session does so in a copy.
"""

import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from pathlib import Path

from mistralcli.cli.chat.events import Event, changes
from mistralcli.cli.chat.session_file import (
    Resumed,
    SessionInfo,
    as_written,
    going_on,
    model_of,
    modified_at,
    read_events,
    session_info,
)
from mistralcli.cli.chat.state import ChatState
from mistralcli.errors import DiskError, MistralError, UsageError
from mistralcli.file_lock import try_lock

_PIECE_EVERY_S = 1.0


@dataclass(frozen=True)
class _Writing:
    """A file that this chat writes: its first `size_bytes` say `state` and `model`; anything behind is torn."""

    path: Path
    descriptor: int
    size_bytes: int = 0
    state: ChatState = field(default_factory=ChatState)
    model: str = ""


def cache_path(session_path: Path) -> Path:
    """Where the KV cache of a session is kept."""
    return session_path.with_suffix(".kv")


class SessionStore:
    """The sessions in a directory, one of which is this chat's from its first message on."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self._clock = clock
        self._writing: _Writing | None = None
        self._piece, self._piece_due = "", 0.0
        self._kept_cache: Path | None = None
        self.is_failing = False
        """Whether the last `record` failed."""

    @property
    def path(self) -> Path | None:
        """This chat's file, once there is one."""
        return None if self._writing is None else self._writing.path

    def record(self, state: ChatState, model: str) -> None:
        """Have the file say `state`; one whose messages are not those of this session begins another.

        What is interrupted or fails is done again by the next call. Raises DiskError.
        """
        self._piece = ""
        written = None if self._writing is None else self._writing.state.tree.nodes
        if written is not None and state.tree.nodes[: len(written)] != written:
            self.close()
        if self._writing is None and not (state.tree.nodes or state.draft or state.attached):
            return
        self.is_failing = True
        try:
            self._writing = writing = self._writing or self._create()
            events = list(changes(writing.state, state))
            if writing.size_bytes == 0:
                events = [_header(model), *events]
            elif model != writing.model:
                events.append({"event": "model", "name": model})
            if events:
                size_bytes = _append(writing, events)
                os.fsync(writing.descriptor)
                self._writing = replace(writing, size_bytes=size_bytes, state=state, model=model)
        except OSError as error:
            raise DiskError(
                f"the session cannot be saved in {self.directory}: {error.strerror}",
                f"{_remedy(error)}, and the next step saves it all; or /save it elsewhere",
            ) from None
        self.is_failing = False

    def piece(self, text: str) -> None:
        """A piece of the answer that is coming, which a kill in the midst of it will not lose, if the disk takes it."""
        self._piece += text
        if self._writing is None or self._clock() < self._piece_due:
            return
        self._piece_due = self._clock() + _PIECE_EVERY_S
        with suppress(OSError):  # which the next `record` meets too
            size_bytes = _append(self._writing, [{"event": "piece", "text": self._piece}])
            self._writing = replace(self._writing, size_bytes=size_bytes)
            self._piece = ""

    def close(self) -> None:
        """Begin another session at the next `record`; this one's file stays as it is."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            os.close(writing.descriptor)

    @property
    def is_untouched(self) -> bool:
        """Whether the session was resumed and nothing has been asked in it since."""
        return self._kept_cache is not None

    def take_kept_cache(self) -> Path | None:
        """The file that may have the KV cache of the session that was resumed; once."""
        path, self._kept_cache = self._kept_cache, None
        return path if path is not None and path.exists() else None

    def latest(self) -> SessionInfo | None:
        """The session that was written last."""
        return next(self._listed(), None)

    def listing(self, n_most: int) -> list[SessionInfo]:
        """The sessions that were written last, the newest first."""
        return list(islice(self._listed(), n_most))

    def _listed(self) -> Iterator[SessionInfo]:
        for path in sorted(self.directory.glob("*.jsonl"), key=modified_at, reverse=True):
            try:
                yield session_info(path)
            except MistralError:
                continue  # nothing of it can be read

    def resume(self, path: Path) -> Resumed:
        """Go on with a session: in its file, or in a copy where that is another chat's or damaged.

        Raises:
            UsageError: it is this very session, or there is none in that file.
            MistralError: the file cannot be read.
        """
        if path == self.path:
            raise UsageError("that is the session that you are in", "/branch lists its branches")
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise MistralError(f"the session {path} cannot be opened: {error.strerror}") from None
        try:
            is_free = try_lock(descriptor)
            size_bytes, events, damage = read_events(path)
            written = as_written(path, events)
        except BaseException:
            os.close(descriptor)
            raise
        self.close()
        self._kept_cache = cache_path(path)
        model = model_of(path, events)
        resumed = going_on(written, events, model)
        if is_free and damage is None:
            self._writing = _Writing(path, descriptor, size_bytes, written, model)
            return resumed
        os.close(descriptor)
        note = damage or "another chat is in this session, so it goes on in a copy"
        return replace(resumed, notes=(note, *resumed.notes))

    def _create(self) -> _Writing:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        path = self.directory / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.jsonl"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try_lock(descriptor)
        return _Writing(path, descriptor)


def _remedy(error: OSError) -> str:
    return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see who may write there"


def _header(model: str) -> Event:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"event": "session", "version": 1, "started": started, "model": model}


def _append(writing: _Writing, events: list[Event]) -> int:
    """Write behind what is whole; how many bytes are whole then."""
    data = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events).encode()
    os.ftruncate(writing.descriptor, writing.size_bytes)
    at = writing.size_bytes
    while data:
        n_written = os.pwrite(writing.descriptor, data, at)
        at, data = at + n_written, data[n_written:]
    return at
