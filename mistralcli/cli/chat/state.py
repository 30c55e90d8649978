"""What a chat is made of: conversation and settings (`ChatState`), and what they stand on (`Chat`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from mistralcli.conversation import Conversation
from mistralcli.errors import UsageError
from mistralcli.sampling import SamplingParams
from mistralcli.session import Completion, Session


@dataclass(frozen=True)
class ChatState:
    """A chat between two inputs; every input makes a new state.

    `max_tokens` None lets the model end by itself. `last` is the latest answer, `draft` what the next prompt
    offers for editing.
    """

    conversation: Conversation = field(default_factory=Conversation)
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    last: Completion | None = None
    draft: str = ""
    leaving: bool = False

    @property
    def system(self) -> str | None:
        return next((m.content for m in self.conversation.messages if m.role == "system"), None)

    @property
    def awaits_answer(self) -> bool:
        """Whether the last word is the user's."""
        messages = self.conversation.messages
        return bool(messages) and messages[-1].role == "user"


class Terminal(Protocol):
    """Where a chat reads its inputs and shows its answers."""

    def read(self, draft: str) -> str:
        """The next input, `draft` offered for editing. EOFError or KeyboardInterrupt when the user leaves."""

    def write(self, text: str) -> None:
        """Show a piece of an answer."""

    def note(self, message: str) -> None:
        """Show a line about the chat that is no part of it."""


@dataclass(frozen=True)
class Chat:
    """What stays the same for a chat's whole life."""

    session: Session
    terminal: Terminal


@dataclass(frozen=True)
class Setting:
    """A number that `/set` changes; an optional one can also be None, written `none`."""

    kind: type[int] | type[float]
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of the right kind; JSON also has true, NaN and integers without end."""
        if value is None or isinstance(value, bool):
            return value is None and self.optional
        right_kind = isinstance(value, int) or (self.kind is float and isinstance(value, float))
        return right_kind and bool(abs(value) < 2**63)

    def describe(self) -> str:
        return ("a whole number" if self.kind is int else "a number") + (" or none" if self.optional else "")


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "temperature": Setting(float),
        "top_p": Setting(float),
        "top_k": Setting(int),
        "min_p": Setting(float),
        "repeat_penalty": Setting(float),
        "seed": Setting(int, optional=True),
        "max_tokens": Setting(int, optional=True),
    }
)


def settings_of(state: ChatState) -> dict[str, int | float | None]:
    """The present value of every setting."""
    return {name: getattr(state if name == "max_tokens" else state.params, name) for name in SETTINGS}


def with_setting(state: ChatState, name: str, value: Any) -> ChatState:
    """`state` with one setting changed. Raises UsageError for an unknown name or an impossible value."""
    if name not in SETTINGS:
        raise UsageError(f"there is no setting {name!r}", f"the settings are {', '.join(SETTINGS)}")
    if not SETTINGS[name].accepts(value):
        raise UsageError(f"{name} must be {SETTINGS[name].describe()}, not {value!r}")
    if name == "max_tokens":
        if value is not None and value < 1:
            raise UsageError(f"max_tokens is {value}; it must be 1 or more")
        return replace(state, max_tokens=value)
    return replace(state, params=replace(state.params, **{name: value}))
