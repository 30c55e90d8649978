"""One file from the Hub to the disk: several connections, hashed on the way, gone on with wherever it was stopped.

    connections ─▶ part file, in any order          (`PartFile`: which bytes are here)
                     └─▶ hash, in order, behind what is here without a gap, by a thread that reads it back from the
                         kernel's memory; what an earlier pull left is read from the disk by the same loop

The file's digest, which the Hub lists for the commit, is its identity. So an ETag that changes under way tells nothing
that the digest will not: the transfer goes on, and where the content was really another, the file is fetched anew.
"""

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mistralcli.errors import DiskError, IntegrityError, MistralError
from mistralcli.hub_cache import PART_SUFFIX
from mistralcli.hub_errors import our_errors
from mistralcli.hub_http import Body, Patience, Remote, TryAgainError
from mistralcli.part_file import PartFile
from mistralcli.units import size_text
from quant.staging import free_bytes

OnBytes = Callable[[int], None]
"""Called now and then with the bytes of the file that are here."""
OnNote = Callable[[str], None]
"""Called with a line for the user: what is waited for."""

CONNECTIONS = 4
"""Of one file at a time. More gain nothing on loopback; over a long way one connection is often held at 50 MB/s."""
_FLUSH_INTERVAL_S = 5.0
"""A power cut costs what came since, and what the flush took. A killed process costs none of it."""
_REPORT_INTERVAL_S = 0.1
_HASH_BYTES = 1 << 20
_IGNORED_RANGES = 2
"""So many times a whole file in the place of a range is not taken: it may be one of many servers that does so."""
_QUIET_WAIT_S = 3.0
"""Shorter waits are not worth a line."""


def fetch(remote: Remote, target: Path, *, patience: Patience, on_bytes: OnBytes, on_note: OnNote) -> None:
    """Have the file at `target`, which is not there, with the digest that the Hub lists; goes on with a part file.

    Raises:
        IntegrityError: it came twice with another digest; nothing of it is kept.
        NetworkError: the network failed more often than patience allows. What came is kept, as with all that follow.
        DiskError: the disk is full or cannot be written.
        MistralError: the Hub refuses.
    """
    for _ in range(2):
        with our_errors(remote.request):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = PartFile(target.with_name(target.name + PART_SUFFIX), remote.file.size_bytes)
            if _Transfer(remote, part, patience, on_bytes, on_note).run() == remote.file.digest:
                part.move_to(target)
                return
            part.discard()
    raise IntegrityError(
        f"{remote.file.name} of {remote.request.model} is not what {remote.request.host} lists: "
        "it came twice with another hash",
        "it is damaged on the Hub or on the way: pull again later; all other files are kept",
    )


def part_bytes(target: Path) -> int:
    """How many bytes a part file of `target` takes on the disk."""
    try:
        return target.with_name(target.name + PART_SUFFIX).stat().st_blocks * 512
    except OSError:
        return 0


class _Transfer:
    """The threads of one file: connections, one that hashes, one that flushes. The first error ends them all."""

    def __init__(
        self, remote: Remote, part: PartFile, patience: Patience, on_bytes: OnBytes, on_note: OnNote
    ) -> None:
        self._remote = remote
        self._part = part
        self._patience = patience
        self._on_bytes = on_bytes
        self._on_note = on_note
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._claimed: set[int] = set()
        self._takes_ranges = False
        self._is_shared = False
        self._ignored_ranges = 0
        self._failures = 0
        self._received_at_failure = -1
        self._not_before = 0.0
        self._notes: list[str] = []
        self._digest = ""

    def run(self) -> str:
        """Fetch what is missing; returns the digest of the whole."""
        flusher = self._start(self._flush_now_and_then)
        self._start(self._hash)
        if self._part.missing():
            self._start(self._connect)
        try:
            while self._error is None and not self._digest:
                with self._changed:
                    self._changed.wait_for(self._is_over, _REPORT_INTERVAL_S)
                if self._takes_ranges and not self._is_shared:
                    self._is_shared = True
                    for _ in self._part.missing()[1:CONNECTIONS]:
                        self._start(self._connect)
                self._report()
        finally:
            self._over.set()
        if self._error is not None:
            with suppress(OSError):
                self._part.flush()
            raise self._with_kept(self._error)
        flusher.join()
        self._report()
        return self._digest

    def _is_over(self) -> bool:
        return self._error is not None or bool(self._digest) or (self._takes_ranges and not self._is_shared)

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - it is raised where the others are waited for
                self._fail(error)

        thread = threading.Thread(target=run, name=f"pull {work.__name__}", daemon=True)
        thread.start()
        return thread

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._over.set()
            self._changed.notify_all()

    def _report(self) -> None:
        self._on_bytes(self._part.received_bytes)
        while self._notes:
            self._on_note(self._notes.pop(0))

    def _with_kept(self, error: BaseException) -> BaseException:
        """The error; its hint says what is kept."""
        received = self._part.received_bytes
        if isinstance(error, MistralError) and not isinstance(error, IntegrityError) and received:
            name, size = self._remote.file.name, self._remote.file.size_bytes
            kept = f"{size_text(received)} of {size_text(size)} of {name} are kept: pulling again goes on from there"
            return type(error)(error.message, f"{error.hint}; {kept}" if error.hint else kept)
        return error

    # Connections

    def _connect(self) -> None:
        """Fetch pieces until there is none left that another connection is not at."""
        while (index := self._claim()) is not None:
            started = time.monotonic()
            try:
                self._require_space()
                start, end = self._part.gap(index)
                with our_errors(self._remote.request), self._remote.open(start, end) as body:
                    self._take(body, start)
            except TryAgainError as failure:
                self._bear(failure, started)
            finally:
                with self._changed:
                    self._claimed.discard(index)

    def _claim(self) -> int | None:
        with self._changed:
            free = (index for index in self._part.missing() if index not in self._claimed)
            index = None if self._over.is_set() else next(free, None)
            if index is not None:
                self._claimed.add(index)
            return index

    def _take(self, body: Body, start: int) -> None:
        """Write what comes. Of a whole file in the place of a range, what is here already is passed over."""
        if body.start != start:
            self._ignored_ranges += 1
            if self._ignored_ranges <= _IGNORED_RANGES:
                raise TryAgainError(self._remote.broken_off("it sent the whole file for a part of it"))
        elif body.end < self._part.size_bytes or start:
            self._takes_ranges = True
        position = body.start
        for piece in body.pieces:
            if self._over.is_set():
                return
            self._part.write(position, piece)
            position += len(piece)
            with self._changed:
                self._changed.notify_all()
        if position < body.end:
            raise TryAgainError(self._remote.broken_off(f"{body.end - position:,} bytes were missing"))

    def _bear(self, failure: TryAgainError, started: float) -> None:
        """Wait before the next try, or raise when patience is over.

        Connections that fail together count as one failure: what was begun before the last wait is the same trouble.
        """
        with self._changed:
            if started >= self._not_before:
                received = self._part.received_bytes
                self._failures = self._failures + 1 if received == self._received_at_failure else 1
                self._received_at_failure = received
                asked_s = failure.after_s
                if self._failures > self._patience.retries or (asked_s or 0) > self._patience.longest_asked_s:
                    raise failure.final from failure
                at_once = asked_s == 0 and self._failures == 1
                wait_s = 0.0 if at_once else self._patience.wait_s(self._failures, asked_s)
                self._not_before = time.monotonic() + wait_s
                if wait_s > _QUIET_WAIT_S:
                    self._notes.append(f"{failure.final.message}; trying again in {wait_s:.0f} s")
        self._over.wait(max(0.0, self._not_before - time.monotonic()))

    def _require_space(self) -> None:
        missing = self._part.size_bytes - self._part.received_bytes
        free = free_bytes(self._part.path.parent)
        if free < missing:
            raise DiskError(
                f"the disk is filling up: {self._remote.file.name} needs {size_text(missing)} more, and "
                f"{self._part.path.parent} has {size_text(free)} free",
                "free some space, or name a larger disk in HF_HOME",
            )

    # Beside them

    def _hash(self) -> None:
        """Hash the file behind its frontier, from its first byte on."""
        digest, buffer = self._remote.file.new_hash(), memoryview(bytearray(_HASH_BYTES))
        position = 0
        while position < self._part.size_bytes:
            with self._changed:
                if (ready := self._part.frontier) == position:
                    self._changed.wait(_REPORT_INTERVAL_S)
            while position < ready and not self._over.is_set():
                n_bytes = self._part.read_into(buffer[: ready - position], position)
                if not n_bytes:
                    raise OSError(errno.EIO, "it was cut off by another program", str(self._part.path))
                digest.update(buffer[:n_bytes])
                position += n_bytes
            if self._over.is_set():
                return
        with self._changed:
            self._digest = digest.hexdigest()
            self._changed.notify_all()

    def _flush_now_and_then(self) -> None:
        while not self._over.wait(_FLUSH_INTERVAL_S):
            self._part.flush()
