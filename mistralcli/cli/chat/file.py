"""Saved chats: one JSON object with the model's name, the system prompt, the messages and the settings.

    {"format": "mistral-chat", "version": 1, "model": NAME, "system": TEXT or null,
     "messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}, ...],
     "settings": {"temperature": 0.7, ...}}

Files come from anywhere, so every part of one is checked before any is used.
"""

import json
import os
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from mistralcli.cli.chat.state import SETTINGS, ChatState, settings_of, with_setting
from mistralcli.conversation import Conversation, Message, Role
from mistralcli.errors import DiskError, IntegrityError, MistralError, UsageError

MAX_SIZE_BYTES = 64 * 2**20
"""Far more than any context holds; larger files are refused unread."""

_FORMAT = {"format": "mistral-chat", "version": 1}


def save_chat(path: Path, model: str, state: ChatState) -> None:
    """Write the chat to `path`, readable by its owner alone; the file is there whole or not at all.

    Raises:
        UsageError: `path` exists and is something else than a saved chat.
        DiskError: it cannot be written.
    """
    messages = [
        {"role": m.role, "content": m.content} for m in state.conversation.messages if m.role != "system"
    ]
    parts = {"model": model, "system": state.system, "messages": messages, "settings": settings_of(state)}
    try:
        if path.exists() and not _is_saved_chat(path):
            raise UsageError(
                f"{path} exists and is not a saved chat", "choose another name, or remove it first"
            )
        _replace(path, json.dumps(_FORMAT | parts, ensure_ascii=False, indent=1) + "\n")
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
        return _text(saved, "model"), _state(saved)
    except MistralError as error:
        raise IntegrityError(f"{path} is not a chat that can be loaded: {error.message}") from None


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


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
    if not isinstance(saved, dict) or any(saved.get(key) != value for key, value in _FORMAT.items()):
        raise IntegrityError(f"{path} is not a saved chat of version {_FORMAT['version']}")
    return saved


def _state(saved: dict[str, Any]) -> ChatState:
    messages = saved.get("messages")
    if not isinstance(messages, list):
        raise IntegrityError("messages is not a list")
    conversation = Conversation.of(_message(message, index) for index, message in enumerate(messages))
    system = None if saved.get("system") is None else _text(saved, "system")
    return _with_settings(ChatState(conversation.with_system(system)), saved.get("settings"))


def _message(message: object, index: int) -> Message:
    """User and assistant take turns, the user first."""
    role: Role = "assistant" if index % 2 else "user"
    if not isinstance(message, dict) or message.get("role") != role:
        raise IntegrityError(f"message {index + 1} is not the {role}'s")
    return Message(role, _text(message, "content", f" of message {index + 1}"))


def _text(holder: dict[str, Any], key: str, of_what: str = "") -> str:
    text = holder.get(key)
    if not isinstance(text, str) or not text:
        raise IntegrityError(f"the {key}{of_what} is not text")
    if not text.isascii() and text != text.encode("utf-8", errors="replace").decode("utf-8"):
        raise IntegrityError(f"the {key}{of_what} holds half a surrogate pair")
    return text


def _with_settings(state: ChatState, settings: object) -> ChatState:
    if not isinstance(settings, dict) or settings.keys() != SETTINGS.keys():
        raise IntegrityError(f"settings must be {', '.join(SETTINGS)}")
    for name, value in settings.items():
        state = with_setting(state, name, value)
    return state
