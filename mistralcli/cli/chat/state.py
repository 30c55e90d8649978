"""What a chat is made of: conversation and settings (`ChatState`), and what they stand on (`Chat`)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from mistralcli.cli.chat.tree import Tree
from mistralcli.conversation import Conversation, Message
from mistralcli.run_options import SamplingParams

if TYPE_CHECKING:
    from mistralcli.cli.chat.sessions import SessionStore
    from mistralcli.session import Completion, Session


@dataclass(frozen=True)
class Attachment:
    """A file whose text goes with the next message."""

    name: str
    text: str


@dataclass(frozen=True)
class ChatState:
    """A chat between two inputs; every input makes a new state.

    `max_tokens` None lets the model end by itself, `stop` are texts that end an answer. `dropped` are the user's
    messages, by index in the tree, that the model is not sent any more, nor their answers. `attached` goes with the
    next message, `last` is the latest answer, `draft` what the next prompt offers for editing. `continues`: the answer
    that is due goes on with the one at the end.
    """

    tree: Tree = field(default_factory=Tree)
    system: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    dropped: frozenset[int] = frozenset()
    attached: tuple[Attachment, ...] = ()
    last: "Completion | None" = None
    draft: str = ""
    continues: bool = False
    leaving: bool = False

    @property
    def sent(self) -> tuple[int, ...]:
        """The messages of the present branch that the model is sent, by index; what it is to answer always is."""
        kept = [turn for turn in self.turns if turn[0] not in self.dropped]
        if self.awaits_answer and self.turns[-1] not in kept:
            kept.append(self.turns[-1])
        return tuple(index for turn in kept for index in turn)

    @property
    def turns(self) -> list[tuple[int, ...]]:
        """The present branch in turns, by index: a message and its answer, which the last may not have."""
        path = self.tree.path()
        return [path[i : i + 2] for i in range(0, len(path), 2)]

    @property
    def conversation(self) -> Conversation:
        """What the model is sent: an answer that it is to go on with is open, and ends with no white space."""
        messages = [self.tree.nodes[index].message for index in self.sent]
        if self.continues:
            messages[-1] = Message("assistant", messages[-1].content.rstrip(), prefix=True)
        return Conversation.of(messages).with_system(self.system)

    @property
    def awaits_answer(self) -> bool:
        """Whether the last word is the user's, or an answer that is to go on."""
        return self.continues or self.tree.last_role == "user"

    def with_message(self, text: str) -> "ChatState":
        """With the user's next message at the end."""
        tree = self.tree.put(Message("user", text))
        sent_again = {tree.at} if tree.at is not None else set()
        return replace(self, tree=tree, dropped=self.dropped - sent_again, attached=())

    def with_answer(self, text: str, *, unfinished: bool) -> "ChatState":
        """With the answer that is due at the end; one that goes on with another stands beside it, and has its text."""
        tree, last = self.tree, self.tree.last
        if self.continues and last is not None:
            tree, text = tree.back(), last.message.content.rstrip() + text
        tree = tree.put(Message("assistant", text), unfinished=unfinished)
        return replace(self, tree=tree, continues=False)


class Terminal(Protocol):
    """Where a chat reads its inputs and shows its answers."""

    def read(self, draft: str, toolbar: Callable[[], str]) -> str:
        """The next input, `draft` offered for editing. EOFError or KeyboardInterrupt when the user leaves.

        toolbar: a line of plain text about the chat, asked for at each redraw.
        """

    def write(self, text: str) -> None:
        """Show a piece of an answer."""

    def end_answer(self) -> None:
        """The answer is over: what is held back is shown, and the cursor goes to the start of a line."""

    def note(self, message: str) -> None:
        """Show a line about the chat that is no part of it."""

    def edit(self, text: str) -> str | None:
        """`text` as the user leaves it in an editor, None when it is unchanged."""


class Model(Protocol):
    """The model that answers, which may still be loading."""

    @property
    def name(self) -> str: ...

    def ready(self) -> bool:
        """Whether `session` returns at once."""

    def session(self) -> "Session":
        """Waits for it. Raises the MistralError that loading raised, or KeyboardInterrupt."""

    def describe(self) -> str:
        """One line: model, scheme, device, context, memory."""

    def switch(self, name: str) -> None:
        """Load another one in its place. Raises MistralError, and keeps the old one, where there is none."""


@dataclass(frozen=True)
class Chat:
    """What stays the same for a chat's whole life."""

    model: Model
    terminal: Terminal
    store: "SessionStore"

    @property
    def session(self) -> "Session":
        """The model's session, once it is loaded."""
        return self.model.session()
