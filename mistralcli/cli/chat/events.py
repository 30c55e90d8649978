"""A chat as a list of events: what changed from one state to the next, and the state again from all of them.

    {"event": "message", "parent": 3, "role": "user", "content": TEXT}    role assistant may have "unfinished": true
    {"event": "at", "message": 3}                   the place in the tree; null is its beginning
    {"event": "settings", "temperature": 0.7, …}    {"event": "system", "text": TEXT or null}
    {"event": "dropped", "messages": [0, 2]}        {"event": "draft", "text": TEXT}
    {"event": "attached", "files": [{"name": NAME, "text": TEXT}]}              what goes with the next message

A saved chat (`file.py`) and a session on disk (`sessions.py`) hold the same messages and settings, and are checked
here: files come from anywhere.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mistralcli.cli.chat.settings import SETTINGS, settings_of, with_setting
from mistralcli.cli.chat.state import Attachment, ChatState
from mistralcli.cli.chat.tree import Node, Tree
from mistralcli.conversation import Message, Role
from mistralcli.errors import IntegrityError

Event = dict[str, Any]

MAX_MESSAGES = 20_000
"""More than anybody says in one chat, and few enough to be put together in a second."""


def changes(before: ChatState, after: ChatState) -> Iterator[Event]:
    """The events that lead from one state to the next, which has the same messages and maybe more."""
    for node in after.tree.nodes[len(before.tree.nodes) :]:
        yield {"event": "message"} | node_json(node)
    newest = len(after.tree.nodes) - 1
    came_to = newest if len(before.tree.nodes) <= newest else before.tree.at
    if after.tree.at != came_to:
        yield {"event": "at", "message": after.tree.at}
    if settings_of(before) != settings_of(after):
        yield {"event": "settings"} | settings_of(after)
    if before.system != after.system:
        yield {"event": "system", "text": after.system}
    if before.dropped != after.dropped:
        yield {"event": "dropped", "messages": sorted(after.dropped)}
    if before.attached != after.attached:
        yield {"event": "attached", "files": [vars(file) for file in after.attached]}
    if before.draft != after.draft:
        yield {"event": "draft", "text": after.draft}


def applied(state: ChatState, event: Event) -> ChatState:
    """The state after an event; one of an unknown kind changes nothing. Raises MistralError for a bad one."""
    step = _STEPS.get(str(event.get("event")))
    return state if step is None else step(state, event)


def node_json(node: Node) -> Event:
    unfinished = {"unfinished": True} if node.unfinished else {}
    return {"parent": node.parent, "role": node.message.role, "content": node.message.content} | unfinished


def _message(state: ChatState, event: Event) -> ChatState:
    return replace(state, tree=with_node(state.tree, event))


def with_node(tree: Tree, saved: object) -> Tree:
    """The tree with a message that was saved, at it. User and assistant take turns, the user first."""
    number = len(tree.nodes) + 1
    if not isinstance(saved, dict):
        raise IntegrityError(f"message {number} is not an object")
    if number > MAX_MESSAGES:
        raise IntegrityError(f"there are more than {MAX_MESSAGES:,} messages")
    tree = tree.move(place(tree, saved.get("parent"), f"the parent of message {number}"))
    role: Role = "assistant" if tree.last_role == "user" else "user"
    if saved.get("role") != role:
        raise IntegrityError(f"message {number} is not the {role}'s")
    content = text(saved, "content", f" of message {number}")
    unfinished = role == "assistant" and saved.get("unfinished") is True
    return tree.add(Message(role, content), unfinished=unfinished)


def place(tree: Tree, index: object, what: str) -> int | None:
    """`index`, if it is that of a message, or None."""
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tree.nodes):
        raise IntegrityError(f"{what} is no message")
    return index


def text(holder: Mapping[str, Any], key: str, of_what: str = "") -> str:
    """A text that is not empty, and that a tokenizer can take."""
    value = holder.get(key)
    if not isinstance(value, str) or not value:
        raise IntegrityError(f"the {key}{of_what} is not text")
    if not value.isascii() and value != value.encode("utf-8", errors="replace").decode("utf-8"):
        raise IntegrityError(f"the {key}{of_what} holds half a surrogate pair")
    return value


def _at(state: ChatState, event: Event) -> ChatState:
    return replace(state, tree=state.tree.move(place(state.tree, event.get("message"), "the place")))


def _settings(state: ChatState, event: Event) -> ChatState:
    return with_settings(state, {name: event[name] for name in event if name != "event"})


def with_settings(state: ChatState, settings: object) -> ChatState:
    """`state` with saved settings: all that there are. Version 1 had no `stop`."""
    if not isinstance(settings, dict) or {"stop"} | settings.keys() != SETTINGS.keys():
        raise IntegrityError(f"settings must be {', '.join(SETTINGS)}")
    for name, value in settings.items():
        state = with_setting(state, name, value)
    for stop in state.stop:
        text({"stop": stop}, "stop")
    return state


def _system(state: ChatState, event: Event) -> ChatState:
    return replace(state, system=None if event.get("text") is None else text(event, "text"))


def _dropped(state: ChatState, event: Event) -> ChatState:
    return replace(state, dropped=with_dropped(state.tree, event.get("messages")))


def with_dropped(tree: Tree, saved: object) -> frozenset[int]:
    """The messages that a saved list says are no longer sent."""
    if not isinstance(saved, list):
        raise IntegrityError("the dropped messages are not a list")
    places = (place(tree, index, "a dropped message") for index in saved)
    return frozenset(index for index in places if index is not None)


def _attached(state: ChatState, event: Event) -> ChatState:
    return replace(state, attached=with_attached(event.get("files")))


def with_attached(saved: object) -> tuple[Attachment, ...]:
    """The files that a saved list says go with the next message."""
    if not isinstance(saved, list) or not all(isinstance(file, dict) for file in saved):
        raise IntegrityError("the attached files are not a list of objects")
    of_what = " of an attached file"
    return tuple(Attachment(text(file, "name", of_what), text(file, "text", of_what)) for file in saved)


def _draft(state: ChatState, event: Event) -> ChatState:
    return replace(state, draft=text(event, "text") if event.get("text") else "")


_STEPS: Mapping[str, Callable[[ChatState, Event], ChatState]] = MappingProxyType(
    {
        "message": _message,
        "at": _at,
        "settings": _settings,
        "system": _system,
        "dropped": _dropped,
        "attached": _attached,
        "draft": _draft,
    }
)
