"""A session's file, read: its events as far as they are whole, and the chat that they lead to."""

import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from mistralcli.cli.chat.events import Event, applied
from mistralcli.cli.chat.file import MAX_SIZE_BYTES
from mistralcli.cli.chat.state import ChatState
from mistralcli.errors import IntegrityError, MistralError


@dataclass(frozen=True)
class SessionInfo:
    """What a list of sessions says of one; `first` is how its first message begins, in one line."""

    path: Path
    changed: datetime
    model: str
    first: str
    n_messages: int


@dataclass(frozen=True)
class Resumed:
    """A session that goes on: its chat, the model that it was held with, and what the user is to know."""

    state: ChatState
    model: str
    notes: tuple[str, ...] = ()


def modified_at(path: Path) -> float:
    """When a file was last written, in seconds since the epoch; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:  # removed in this moment
        return 0.0


def read_events(path: Path) -> tuple[int, list[Event], str | None]:
    """The events of a file up to where it is torn or damaged: the bytes that they take, they, and what is wrong.

    A last line without its end is not damage: that is how a kill leaves it.
    """
    try:
        if path.stat().st_size > MAX_SIZE_BYTES:
            raise IntegrityError(f"{path} has more than {MAX_SIZE_BYTES >> 20} MiB; no session is that large")
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise MistralError(f"the session {path} cannot be read: {error.strerror}") from None
    events: list[Event] = []
    size_bytes = 0
    for number, line in enumerate(lines, 1):
        event = _event(line)
        if event is None or not line.endswith(b"\n"):
            is_torn = number == len(lines) and not line.endswith(b"\n")
            lost = f"{path} is damaged from line {number} on; what comes before goes on in a copy"
            return size_bytes, events, None if is_torn else lost
        events.append(event)
        size_bytes += len(line)
    return size_bytes, events, None


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def session_info(path: Path) -> SessionInfo:
    _, events, _ = read_events(path)
    said = [str(event.get("content")) for event in events if event.get("event") == "message"]
    first = " ".join(said[0].split()) if said else ""
    return SessionInfo(
        path, datetime.fromtimestamp(modified_at(path)), model_of(path, events), first, len(said)
    )


def model_of(path: Path, events: list[Event]) -> str:
    """The model of a session's last answers. Raises IntegrityError where the file is no session."""
    if not events or events[0].get("event") != "session" or events[0].get("version") != 1:
        raise IntegrityError(f"{path} is no session that this version can read")
    names = [event.get("name") for event in events if event.get("event") == "model"]
    return str(names[-1] if names else events[0].get("model"))


def as_written(path: Path, events: list[Event]) -> ChatState:
    """The state that a file's events say, whether or not a chat can go on so."""
    model_of(path, events)
    state = ChatState()
    try:
        for event in events:
            state = applied(state, event)
    except MistralError as error:
        raise IntegrityError(f"{path} is no session that can go on: {error.message}") from None
    return state


def going_on(state: ChatState, events: list[Event], model: str) -> Resumed:
    """The chat with the answer that was coming when it ended; a message that has none is the draft again."""
    n_before = next((i for i in range(len(events), 0, -1) if events[i - 1].get("event") != "piece"), 0)
    came = "".join(str(event.get("text")) for event in events[n_before:])
    if came:
        state = replace(state, continues=state.tree.last_role == "assistant")
        note = "the last answer was cut off when the chat ended; /continue goes on with it"
        return Resumed(state.with_answer(came, unfinished=True), model, (note,))
    if state.awaits_answer and state.tree.last is not None:
        draft = state.draft or state.tree.last.message.content
        state = replace(state, tree=state.tree.back(), draft=draft)
    return Resumed(state, model)
