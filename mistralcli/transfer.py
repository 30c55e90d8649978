"""One file from the Hub to the disk: several connections, hashed on the way, gone on with wherever it was stopped.

    connections ─▶ part file, in any order              (`PartFile`: which bytes are here)
        └─▶ blocks that have just come (`FreshBlocks`) ─▶ hash, in order, behind what is here without a gap, by a
            thread of its own; what is not among them, or what an earlier pull left, it reads back from the part file

One connection begins. Where it is not fast others join it, each with a piece of the file at a time.

The file's digest, which the Hub lists for the commit, is its identity. So an ETag that changes under way tells nothing
that the digest will not: the transfer goes on, and where the content was really another, the file is fetched anew.
"""

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from mistralcli.errors import DiskError, IntegrityError, MistralError
from mistralcli.fresh_blocks import BLOCK_BYTES, Block, FreshBlocks
from mistralcli.hub_body import Body, BrokenOffError
from mistralcli.hub_cache import PART_SUFFIX
from mistralcli.hub_errors import our_errors
from mistralcli.hub_http import Patience, Remote, TryAgainError
from mistralcli.part_file import PartFile
from mistralcli.units import size_text
from quant.staging import free_bytes

OnBytes = Callable[[int], None]
"""Called now and then with the bytes of the file that are here."""
OnNote = Callable[[str], None]
"""Called with a line for the user: what is waited for."""

CONNECTIONS = 4
"""Of one file at a time: over a long way one is often held at 50 MB/s."""
_ENOUGH_BYTES_PER_S = 150e6
"""One connection that brings so much stays alone: the processor limits then, and four take 0.2 to 0.4 s a GB more."""
_TRIAL_S = 0.25
"""Not sooner is a connection taken for one that brings less."""
_RUN_BYTES = 256 << 20
"""At most so much is asked for at once: others can help only behind that."""
_FLUSH_INTERVAL_S = 5.0
"""A power cut costs what came since, and what the flush took. A killed process costs none of it."""
_REPORT_INTERVAL_S = 0.1
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
        self._fresh = FreshBlocks()
        self._takes_ranges = False
        self._run_began = time.monotonic(), 0
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
            while not self._over.wait(_REPORT_INTERVAL_S):
                if self._wants_help():
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

    def _wants_help(self) -> bool:
        """Whether there is one connection, and it has shown that it does not bring enough."""
        is_tried = time.monotonic() - self._run_began[0] > _TRIAL_S
        return self._takes_ranges and not self._is_shared and is_tried and not self._brings_enough()

    def _brings_enough(self) -> bool:
        """Whether the present or last answer to a lone connection comes, or came, fast."""
        began, received = self._run_began
        return self._part.received_bytes - received >= _ENOUGH_BYTES_PER_S * (time.monotonic() - began)

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
        while pieces := self._claim():
            started = time.monotonic()
            try:
                self._require_space()
                start, end = self._part.gap(pieces[0])[0], self._part.gap(pieces[-1])[1]
                with our_errors(self._remote.request), self._remote.open(start, end) as body:
                    self._take(body, start)
            except TryAgainError as failure:
                self._bear(failure, started)
            finally:
                with self._changed:
                    self._claimed.difference_update(pieces)

    def _claim(self) -> list[int]:
        """A piece; for a lone connection that brings enough, with those behind it that are empty."""
        with self._changed:
            free = [index for index in self._part.missing() if index not in self._claimed]
            is_fast = self._takes_ranges and not self._is_shared and self._brings_enough()
            most = _RUN_BYTES // self._part.piece_bytes if is_fast else 1
            pieces = [] if self._over.is_set() else free[:1]
            for index in free[1:most]:
                if index != pieces[-1] + 1 or not self._part.is_empty(index):
                    break
                pieces.append(index)
            self._claimed.update(pieces)
            return pieces

    def _take(self, body: Body, start: int) -> None:
        """Write what comes. Of a whole file in the place of a range, what is here already is passed over."""
        if body.start != start:
            self._ignored_ranges += 1
            if self._ignored_ranges <= _IGNORED_RANGES:
                raise BrokenOffError("it sent the whole file for a part of it")
        elif body.end < self._part.size_bytes or start:
            self._takes_ranges = True
        self._run_began = time.monotonic(), self._part.received_bytes
        position = body.start
        while position < body.end and not self._over.is_set():
            position = self._take_block(body, position)

    def _take_block(self, body: Body, start: int) -> int:
        """Write a block's bytes as they come, and give it to the hash where all were new; returns its end."""
        buffer, filled, n_new = self._fresh.buffer(), 0, 0
        limit = min(BLOCK_BYTES, body.end - start)
        try:
            while filled < limit and not self._over.is_set():
                n_bytes = body.read_into(buffer[filled:limit])
                n_new += self._part.write(start + filled, buffer[filled : filled + n_bytes])
                filled += n_bytes
        finally:
            if filled and n_new == filled:
                self._fresh.give(start, Block(buffer, filled))
            else:
                self._fresh.spare(buffer)
            with self._changed:
                self._changed.notify_all()
        return start + filled

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
        digest, own = self._remote.file.new_hash(), memoryview(bytearray(BLOCK_BYTES))
        position = 0
        while position < self._part.size_bytes:
            with self._changed:
                self._changed.wait_for(partial(self._can_hash, position), _REPORT_INTERVAL_S)
            if self._over.is_set():
                return
            block, end = self._fresh.take(position, min(self._part.frontier, position + BLOCK_BYTES))
            if block is None:
                block = Block(own, self._read_back(own[: end - position], position))
            digest.update(block.buffer[: block.n_bytes])
            position += block.n_bytes
            if block.buffer is not own:
                self._fresh.spare(block.buffer)
        self._digest = digest.hexdigest()
        self._over.set()

    def _can_hash(self, position: int) -> bool:
        """Whether the next bytes are in memory, or so many are here that they can be none of a block to come."""
        at_least = min(position + 2 * BLOCK_BYTES, self._part.size_bytes)
        return self._over.is_set() or self._fresh.has(position) or self._part.frontier >= at_least

    def _read_back(self, buffer: memoryview, position: int) -> int:
        n_bytes = self._part.read_into(buffer, position) if buffer else 0
        if buffer and not n_bytes:
            raise OSError(errno.EIO, "it was cut off by another program", str(self._part.path))
        return n_bytes

    def _flush_now_and_then(self) -> None:
        while not self._over.wait(_FLUSH_INTERVAL_S):
            self._part.flush()
