"""An answer at the end of a chat's state: asked for, shown and saved as it comes, kept however it ends."""

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from mistralcli.cli.chat.kept_cache import restore_cache
from mistralcli.cli.chat.ledger import drop_offer, overflow
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.cli.console import error_text, on_interrupt
from mistralcli.errors import ContextOverflowError, DiskError, MistralError

if TYPE_CHECKING:
    from mistralcli.session import Completion


def save(chat: Chat, state: ChatState) -> None:
    """Have the session say `state`. A disk that is full is no reason to end a chat; it is said, once."""
    was_failing = chat.store.is_failing
    try:
        chat.store.record(state, chat.model.name)
    except DiskError as error:
        if not was_failing:
            chat.terminal.note(error_text(error))


def answered(chat: Chat, state: ChatState) -> ChatState:
    """The state with the model's answer, shown as it comes; Ctrl-C ends it and keeps what has come.

    What has come is also kept when the process is told to end (SystemExit, which goes on), or when an error breaks it
    off.

    Raises:
        MistralError: there is no answer.
        KeyboardInterrupt: it was stopped before it began.
    """
    completion = _begun(chat, state)
    try:
        with on_interrupt(signal.default_int_handler):
            _show(chat, state, completion)
    except (KeyboardInterrupt, MistralError) as error:
        completion.close()
        if not completion.text:
            raise
        chat.terminal.end_answer()
        chat.terminal.note("(stopped)" if isinstance(error, KeyboardInterrupt) else error_text(error))
    except BaseException:
        if completion.text:
            save(chat, _with(state, completion))
        raise
    else:
        if not completion.text:
            raise MistralError(*_nothing_came(state))
        chat.terminal.end_answer()
        _tell_end(chat, state, completion)
    after = _with(state, completion)
    if after.tree.nodes == state.tree.nodes:
        chat.terminal.note("(the same answer as before: /set temperature or /set seed changes that)")
    return after


def _begun(chat: Chat, state: ChatState) -> "Completion":
    """The answer before its first piece. Raises ContextOverflowError, which offers what to drop."""
    session = chat.session
    conversation = state.conversation
    kept = chat.store.take_kept_cache()
    if kept is not None:
        restore_cache(session, session.tokenizer.encode_chat(conversation), kept)
    try:
        return session.complete_chat(conversation, state.params, max_tokens=state.max_tokens, stop=state.stop)
    except ContextOverflowError:
        raise overflow(session, state) from None


def _show(chat: Chat, state: ChatState, completion: "Completion") -> None:
    """Write the pieces, from the first of which on the session has the turn."""
    if state.continues and state.tree.last is not None:
        chat.terminal.write(_last_line(state.tree.last.message.content.rstrip()))
    for n_before, piece in enumerate(completion):
        chat.terminal.write(piece)
        if n_before == 0:
            save(chat, state)
        chat.store.piece(piece)


def _last_line(text: str) -> str:
    """Where an answer that goes on is taken up on the screen: its last line, or its last code block if that is open."""
    lines = text.splitlines(keepends=True)
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    start = fences[-1] if len(fences) % 2 else len(lines) - 1
    return "".join(lines[max(start, 0) :])


def _with(state: ChatState, completion: "Completion") -> ChatState:
    unfinished = completion.finish_reason != "stop"
    return replace(state.with_answer(completion.text, unfinished=unfinished), last=completion)


def _nothing_came(state: ChatState) -> tuple[str, str]:
    if state.continues:
        return "the model adds nothing to its answer", "it takes it for whole: /retry asks for another"
    return "the model's answer is empty", "/set seed, /system or another message may change that"


def _tell_end(chat: Chat, state: ChatState, completion: "Completion") -> None:
    """Say why when the model was not done, and what goes on from there."""
    if completion.finish_reason != "length":
        return
    if len(completion.token_ids) == state.max_tokens:
        chat.terminal.note(f"(cut off at max_tokens {state.max_tokens}) /continue goes on")
        return
    offer = drop_offer(chat.session, replace(_with(state, completion), continues=True))
    room = f" {offer}, and /continue goes on" if offer else ""
    chat.terminal.note(f"(cut off: the context of {chat.session.max_seq_len:,} tokens is full){room}")
