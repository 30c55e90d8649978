"""A conversation: an ordered list of messages, as chat templates take them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from mistralcli.errors import UsageError

Role = Literal["system", "user", "assistant"]

CONVERSATION_RULE = (
    "a system prompt, or none, comes first; then user and assistant take turns; a user comes last"
)
"""What every chat format takes: the hint for a conversation that one refuses."""


@dataclass(frozen=True)
class Message:
    """One message. `prefix` marks an open assistant message that the model is to continue."""

    role: Role
    content: str
    prefix: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages in order; every change makes a new conversation."""

    messages: tuple[Message, ...] = ()

    @staticmethod
    def of(messages: Iterable[Message]) -> "Conversation":
        return Conversation(tuple(messages))

    def add(self, role: Role, content: str) -> "Conversation":
        return Conversation((*self.messages, Message(role, content)))

    def with_system(self, content: str | None) -> "Conversation":
        """Replace, add or (with None) drop the system prompt, which comes first."""
        rest = tuple(m for m in self.messages if m.role != "system")
        return Conversation(((Message("system", content),) if content else ()) + rest)


def parse_messages(value: Any) -> Conversation:
    """A conversation from JSON: a list of `{"role": …, "content": …}`. Raises UsageError where it is something else."""
    if not isinstance(value, list):
        raise UsageError("messages must be a list")
    found = []
    for message in value:
        role, content = (
            message.get(key) if isinstance(message, dict) else None for key in ("role", "content")
        )
        if role not in get_args(Role) or not isinstance(content, str):
            roles = ", ".join(get_args(Role))
            raise UsageError(f"a message must have a role ({roles}) and a text as its content")
        found.append(Message(cast(Role, role), content))
    return Conversation.of(found)


@dataclass(frozen=True)
class ChatExtras:
    """What a chat format is told beside the messages.

    tools: functions that the model may call, as OpenAI's API describes them (`tools.parse_tools`). variables: for a
    Jinja template, by name; Mistral's own formats have none.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


NO_EXTRAS = ChatExtras()


def well_formed(text: str) -> str:
    """`text` with lone surrogates (Python's sign for bytes of a command line that are no UTF-8) as U+FFFD.

    No tokenizer takes a lone surrogate, and no file in UTF-8 can hold one.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
