"""Saved chats: one JSON object with the model's name, the system prompt, the tree of messages and the settings.

    {"format": "mistral-chat", "version": 2, "model": NAME, "system": TEXT or null,
     "messages": [{"parent": null, "role": "user", "content": TEXT},
                  {"parent": 0, "role": "assistant", "content": TEXT, "unfinished": true}, ...],
     "at": 1, "dropped": [], "attached": [{"name": NAME, "text": TEXT}], "settings": {"temperature": 0.7, ...}}

`parent` and `at` count messages from 0; there need be no `attached`, the files that go with the next message. Version 1
had no branches: no `parent`, `at` and `dropped`, each message behind the one before it. Files come from anywhere, so
every part of one is checked before any is used.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from mistralcli.cli.chat.events import (
    node_json,
    place,
    text,
    with_attached,
    with_dropped,
    with_node,
    with_settings,
)
from mistralcli.cli.chat.settings import settings_of
from mistralcli.cli.chat.state import ChatState
from mistralcli.cli.chat.tree import Tree
from mistralcli.errors import DiskError, IntegrityError, MistralError, UsageError
from mistralcli.whole_file import write_whole

MAX_SIZE_BYTES = 64 * 2**20
"""Far more than any context holds; larger files are refused unread."""

_FORMAT = "mistral-chat"
_VERSION = 2


def save_chat(path: Path, model: str, state: ChatState) -> None:
    """Write the chat to `path`, readable by its owner alone; the file is there whole or not at all.

    Raises:
        UsageError: `path` exists and is something else than a saved chat.
        DiskError: it cannot be written.
    """
    about = {"format": _FORMAT, "version": _VERSION, "model": model, "system": state.system}
    messages = {"messages": [node_json(node) for node in state.tree.nodes], "at": state.tree.at}
    rest = {"dropped": sorted(state.dropped), "attached": [vars(file) for file in state.attached]}
    rest |= {"settings": settings_of(state)}
    try:
        if path.exists() and not _is_saved_chat(path):
            raise UsageError(
                f"{path} exists and is not a saved chat", "choose another name, or remove it first"
            )
        write_whole(path, json.dumps(about | messages | rest, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror}") from None


def rescue_chat(model: str, state: ChatState) -> Path:
    """Save a chat that is about to be lost, under a name of its own in our state directory. Raises DiskError."""
    directory = user_state_path("mistral")
    path = directory / f"rescued-{datetime.now():%Y-%m-%d-%H%M%S}.json"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{directory} cannot be made: {error.strerror}") from None
    save_chat(path, model, state)
    return path


def load_chat(path: Path) -> tuple[str, ChatState]:
    """The name of the model that a chat was held with, and the chat. Raises MistralError for a bad file."""
    saved = _read_json(path)
    try:
        return text(saved, "model"), _state(saved)
    except MistralError as error:
        raise IntegrityError(f"{path} is not a chat that can be loaded: {error.message}") from None


def _is_saved_chat(path: Path) -> bool:
    try:
        _read_json(path)
    except MistralError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, if it says that it is a saved chat."""
    try:
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        if path.stat().st_size > MAX_SIZE_BYTES:
            raise IntegrityError(
                f"{path} has more than {MAX_SIZE_BYTES >> 20} MiB; no saved chat is that large"
            )
        saved = json.loads(path.read_bytes())
    except OSError as error:
        raise MistralError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, an absurd number, or nested absurdly deep
        raise IntegrityError(f"{path} is not a saved chat: it is not JSON") from None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT or saved.get("version") not in (1, 2):
        raise IntegrityError(f"{path} is not a saved chat of version 1 or {_VERSION}")
    return saved


def _state(saved: dict[str, Any]) -> ChatState:
    messages = saved.get("messages")
    if not isinstance(messages, list):
        raise IntegrityError("messages is not a list")
    tree = Tree()
    for message in messages:
        is_line = saved["version"] == 1 and isinstance(message, dict)
        tree = with_node(tree, message | {"parent": tree.at} if is_line else message)
    system = None if saved.get("system") is None else text(saved, "system")
    dropped: frozenset[int] = frozenset()
    if saved["version"] != 1:
        tree = tree.move(place(tree, saved.get("at"), "the place"))
        dropped = with_dropped(tree, saved.get("dropped"))
    attached = with_attached(saved.get("attached", []))
    return with_settings(ChatState(tree, system, dropped=dropped, attached=attached), saved.get("settings"))
