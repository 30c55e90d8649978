"""The commands that move in the tree of a conversation."""

from dataclasses import replace

from mistralcli.cli.chat.inputs import as_input
from mistralcli.cli.chat.ledger import ledger_of, without_oldest
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.conversation import Message
from mistralcli.errors import UsageError

_BEGINNING_CHARS = 48


def beginning(text: str) -> str:
    """The first words of a text, in one line."""
    line = " ".join(text[: 4 * _BEGINNING_CHARS].split())
    return line if len(line) <= _BEGINNING_CHARS else line[: _BEGINNING_CHARS - 1] + "…"


def where(state: ChatState) -> str:
    """The present place in a line, for whoever has not seen what was said there."""
    if state.tree.last is None:
        return "no messages"
    n = len(state.tree.path())
    return (
        f"{n} {'message' if n == 1 else 'messages'}, the last: {beginning(state.tree.last.message.content)}"
    )


def clear(chat: Chat, state: ChatState, argument: str) -> ChatState:
    chat.terminal.note("all messages are forgotten" + ("; /branch has them" if state.tree.nodes else ""))
    return replace(state, tree=state.tree.move(None), attached=())


def undo(chat: Chat, state: ChatState, argument: str) -> ChatState:
    _require_answer(state)
    chat.terminal.note("the last message and its answer are taken back; /branch has them")
    return replace(state, tree=state.tree.back().back())


def retry(chat: Chat, state: ChatState, argument: str) -> ChatState:
    """The branch then ends with the user's message, which is answered as a new one would be."""
    _require_answer(state)
    return replace(_with_last_sent(state), tree=state.tree.back())


def go_on(chat: Chat, state: ChatState, argument: str) -> ChatState:
    _require_answer(state)
    return replace(_with_last_sent(state), continues=True)


def _require_answer(state: ChatState) -> None:
    if state.tree.last_role != "assistant":
        raise UsageError("there is no answer yet")


def _with_last_sent(state: ChatState) -> ChatState:
    """A turn that was dropped, and is answered again, is no longer dropped."""
    return replace(state, dropped=state.dropped - set(state.turns[-1]))


def edit(chat: Chat, state: ChatState, argument: str) -> ChatState:
    """A message comes back as the draft, and what is sent stands in its place; an answer opens in the editor."""
    path = state.tree.path()
    index = path[_number(argument, len(path), "message") - 1]
    node = state.tree.nodes[index]
    before = state.tree.move(node.parent)
    if node.message.role == "user":
        chat.terminal.note(f"what you send takes the place of message {argument}; /branch goes back")
        return replace(state, tree=before, draft=as_input(node.message.content))
    text = chat.terminal.edit(node.message.content)
    if text is None or not text.strip():
        chat.terminal.note("the answer is as it was")
        return state
    chat.terminal.note(f"your answer stands beside message {argument}, and the chat goes on from it")
    return replace(state, tree=before.put(Message("assistant", text)))


def branch(chat: Chat, state: ChatState, argument: str) -> ChatState:
    leaves = state.tree.leaves()
    if not leaves:
        raise UsageError("there are no messages yet")
    if not argument:
        for number, leaf in enumerate(leaves, 1):
            chat.terminal.note(_described(state, number, leaf))
        return state
    leaf = leaves[_number(argument, len(leaves), "branch") - 1]
    after = replace(state, tree=state.tree.move(leaf))
    chat.terminal.note(f"branch {argument}: {where(after)}")
    return after


def _described(state: ChatState, number: int, leaf: int) -> str:
    """A branch in a line: a star at the present one, its length, and where it leaves the present one."""
    path, here = state.tree.path(leaf), state.tree.path()
    n_shared = sum(a == b for a, b in zip(path, here, strict=False))
    if n_shared == len(path):
        return f"* {number:>2}  {len(path):>3} messages, where you are"
    node = state.tree.nodes[path[n_shared]]
    text = beginning(node.message.content) + (" (unfinished)" if node.unfinished else "")
    return f"  {number:>2}  {len(path):>3} messages, from message {n_shared + 1} on: {text}"


def drop(chat: Chat, state: ChatState, argument: str) -> ChatState:
    n_sent = sum(turn[0] not in state.dropped for turn in state.turns)
    if not n_sent:
        raise UsageError("there is no turn that could be dropped")
    n_turns = _number(argument, n_sent, "count of turns")
    after = without_oldest(state, n_turns)
    n_freed = ledger_of(chat.session, state).n_used - ledger_of(chat.session, after).n_used
    which = "oldest turn is" if n_turns == 1 else f"{n_turns:,} oldest turns are"
    chat.terminal.note(f"the {which} not sent to the model any more ({n_freed:,} tokens); they stay here")
    return after


def _number(argument: str, most: int, what: str) -> int:
    """A number from 1 to `most`. Raises UsageError that says what there is."""
    number = int(argument) if argument.isascii() and argument.isdigit() and len(argument) < 10 else 0
    if not 1 <= number <= most:
        there_is = f"there are 1 to {most:,}" if most > 1 else "there is 1" if most else "there is none yet"
        raise UsageError(f"{argument!r} is no {what} of this chat: {there_is}")
    return number
