"""The context ledger: what of the context a chat has used, what the model still sees of it, and what can be dropped.

A layer with a sliding window of W looks at the last W positions, its own among them. So the position that the next
token is made of sees the last W tokens directly; of those before it knows what the layers handed on.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistralcli.cli.chat.attachments import attached_line
from mistralcli.cli.chat.state import ChatState, Model
from mistralcli.conversation import Conversation
from mistralcli.errors import ContextOverflowError, MistralError
from mistralcli.prompt_parts import changed
from mistralcli.run_options import room_for_answer
from mistralcli.sequences import common_length

if TYPE_CHECKING:
    from mistralcli.session import Session


@dataclass(frozen=True)
class Ledger:
    """Tokens used of the context. `window`: how many the model sees directly, None is all. `first_seen`: the message,
    counted from 1, that these begin with or (`within`) in; None where it sees all."""

    n_used: int
    n_ctx: int
    window: int | None = None
    first_seen: int | None = None
    within: bool = False
    n_dropped: int = 0

    @property
    def n_left(self) -> int:
        return max(0, self.n_ctx - self.n_used)

    def toolbar(self) -> str:
        parts = [f"{self.n_used:,} of {self.n_ctx:,} tokens, {self.n_left:,} left"]
        if self.n_dropped:
            parts.append(_turns(self.n_dropped) + " dropped")
        if self.first_seen is not None:
            parts.append(f"sees directly from {self._where}")
        return " · ".join(parts)

    def sentences(self) -> list[str]:
        """The same at length."""
        lines = [f"{self.n_used:,} of {self.n_ctx:,} tokens used, {self.n_left:,} left"]
        if self.n_dropped:
            lines.append(f"{_turns(self.n_dropped)} dropped: kept here, and not sent to the model")
        if self.window is not None:
            lines.append(f"a layer of this model sees {self.window:,} tokens back")
        if self.first_seen is not None:
            lines[-1] += (
                f": the answer sees directly from {self._where} on, and of what is before what its layers hand on"
            )
        return lines

    @property
    def _where(self) -> str:
        return f"{'within ' if self.within else ''}message {self.first_seen}"


def _turns(n: int) -> str:
    return "1 turn" if n == 1 else f"{n:,} turns"


class Toolbar:
    """A line about the context for the prompt, computed once."""

    def __init__(self, model: Model, state: ChatState) -> None:
        self._model = model
        self._state = state
        self._line: str | None = None

    def __call__(self) -> str:
        if self._line is None:
            if not self._model.ready():
                return ""
            try:
                ledger = ledger_of(self._model.session(), self._state).toolbar()
                attached = self._state.attached
                self._line = f"{ledger} · {attached_line(attached)}" if attached else ledger
            except MistralError:  # which the next message is told
                self._line = ""
        return self._line


def ledger_of(session: "Session", state: ChatState) -> Ledger:
    """Raises MistralError where the conversation cannot be tokenized, or the model did not load."""
    token_ids = prompt_ids(session, state.conversation)
    n_dropped = sum(turn[0] not in state.sent for turn in state.turns)
    ledger = Ledger(len(token_ids), session.max_seq_len, window_of(session), n_dropped=n_dropped)
    if ledger.window is None or ledger.n_used <= ledger.window:
        return ledger
    sent = state.sent
    index, start = _message_at(session, state.conversation, token_ids, ledger.n_used - ledger.window)
    if index < len(state.conversation.messages) - len(sent):  # in the system prompt
        return ledger
    number = state.tree.path().index(sent[index - (len(state.conversation.messages) - len(sent))]) + 1
    return replace(ledger, first_seen=number, within=start < ledger.n_used - ledger.window)


def window_of(session: "Session") -> int | None:
    """How many tokens back the layer that sees furthest sees; None is all."""
    windows = [window for window in session.config.sliding_windows if window is not None]
    return max(windows) if len(windows) == len(session.config.sliding_windows) else None


def prompt_ids(session: "Session", conversation: Conversation) -> list[int]:
    """What the model has been sent so far: up to the end of the last answer, or up to where the next one begins."""
    messages = list(conversation.messages)
    if not any(message.role != "system" for message in messages):
        return session.tokenizer.encode(messages[0].content) if messages else []
    if messages[-1].role == "assistant" and not messages[-1].prefix:
        before = session.tokenizer.encode_chat(Conversation.of(messages[:-1]))
        return before + session.tokenizer.encode(messages[-1].content)
    return session.tokenizer.encode_chat(conversation)


def _message_at(
    session: "Session", conversation: Conversation, token_ids: Sequence[int], position: int
) -> tuple[int, int]:
    """The message that a position is in, by its place in the conversation, and where that message's text begins."""
    low, high, found = 0, len(conversation.messages) - 1, 0
    while low < high:
        middle = (low + high + 1) // 2
        start = _start(session, conversation, token_ids, middle)
        if start <= position:
            low, found = middle, start
        else:
            high = middle - 1
    return low, found


def _start(session: "Session", conversation: Conversation, token_ids: Sequence[int], index: int) -> int:
    """The position of a message's first token, whatever the chat format writes around it: where the ids begin to differ
    from those with another text in its place."""
    messages = list(conversation.messages)
    messages[index] = changed(messages[index])
    return common_length(token_ids, prompt_ids(session, Conversation.of(messages)))


def without_oldest(state: ChatState, n_turns: int) -> ChatState:
    """`state` with so many more of the oldest turns that are sent dropped."""
    oldest = [turn[0] for turn in state.turns if turn[0] not in state.dropped][:n_turns]
    return replace(state, dropped=state.dropped | set(oldest))


def overflow(session: "Session", state: ChatState) -> ContextOverflowError:
    """What is said when a turn leaves no room for its answer: by how much, and what would make room."""
    n_all, n_ctx = len(prompt_ids(session, state.conversation)), session.max_seq_len
    last = state.conversation.messages[-1]
    n_last = len(session.tokenizer.encode(last.content))
    what = "the answer so far" if state.continues else "this message"
    return ContextOverflowError(
        f"the next turn does not fit: the context has {n_ctx:,} tokens, what is before takes {n_all - n_last:,} and "
        f"{what} {n_last:,}, so with one for the answer it is {n_all + 1 - n_ctx:,} too many",
        drop_offer(session, state)
        or f"it does not fit alone either: shorten {what}, or ask for a longer --ctx",
    )


def drop_offer(session: "Session", state: ChatState) -> str | None:
    """What the least `/drop` that makes room would do; None where none does."""
    n_all = len(prompt_ids(session, state.conversation))
    n_turns = sum(turn[0] not in state.dropped for turn in state.turns) - (1 if state.awaits_answer else 0)

    def n_left(n_dropped: int) -> int:
        conversation = without_oldest(state, n_dropped).conversation
        return session.max_seq_len - len(prompt_ids(session, conversation))

    n_most = n_left(n_turns)
    if n_turns < 1 or n_most < 1:
        return None
    room = min(room_for_answer(session.max_seq_len), n_most)
    least = bisect_left(range(1, n_turns), True, key=lambda n: n_left(n) >= room) + 1
    which = "the oldest turn" if least == 1 else f"the {least:,} oldest turns"
    return f"/drop {least} forgets {which} ({n_all - session.max_seq_len + n_left(least):,} tokens)"
