"""The chat loop: read an input, run it as a command or have it answered, until the user leaves.

It knows no terminal library and no tensors: `Chat` has the session that answers and the terminal that shows.
"""

import signal
from dataclasses import replace

from mistralcli.cli.chat.commands import run_command
from mistralcli.cli.chat.file import rescue_chat
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.cli.console import error_text, on_interrupt
from mistralcli.errors import ContextOverflowError, MistralError
from mistralcli.session import Completion

QUOTES = '"""'


def run_repl(chat: Chat, state: ChatState) -> None:
    """Chat until /exit or Ctrl-D, which return, or two Ctrl-C, which raise KeyboardInterrupt.

    While an answer comes Ctrl-C stops it; the signal does nothing else, so that none takes the conversation with
    it. An error that nobody foresaw is raised on, after the conversation has been saved.
    """
    with on_interrupt(lambda number, frame: None):
        while not state.leaving:
            try:
                text = chat.terminal.read(state.draft)
                if text.strip():
                    state = step(chat, replace(state, draft=""), text)
            except EOFError:
                return
            except Exception:
                _rescue(chat, state)
                raise


def _rescue(chat: Chat, state: ChatState) -> None:
    """Save the conversation, if there is one, and say where."""
    if state.conversation.messages:
        try:
            path = rescue_chat(chat.session.name, state)
            chat.terminal.note(f"the conversation is saved: /load {path} goes on with it")
        except MistralError as error:
            chat.terminal.note(error_text(error))


def step(chat: Chat, state: ChatState, text: str) -> ChatState:
    """The state after one input. One that fails changes nothing; a message comes back as the next draft."""
    message = message_in(text)
    try:
        if message is None:
            after = run_command(chat, state, text)
        else:
            after = replace(state, conversation=state.conversation.add("user", message))
        return answered(chat, after) if after.awaits_answer else after
    except MistralError as error:
        chat.terminal.note(error_text(error))
    except KeyboardInterrupt:
        chat.terminal.note("(stopped before the answer began)")
    return state if message is None else replace(state, draft=text)


def message_in(text: str) -> str | None:
    '''The message in an input: as it is, or with one slash for `//`, or between `"""`; None for a command.'''
    start = text.lstrip()
    if start.startswith(QUOTES):
        return start.rstrip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    if start.startswith("//"):
        return start[1:]
    return None if start.startswith("/") else text.strip("\n")


def is_open(text: str) -> bool:
    '''Whether an input goes on after Enter: it began with `"""` and has not ended with another.'''
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def answered(chat: Chat, state: ChatState) -> ChatState:
    """The state with the model's answer, shown as it comes; Ctrl-C ends it and keeps what has come.

    Raises:
        MistralError: there is no answer.
        KeyboardInterrupt: it was stopped before it began.
    """
    try:
        completion = chat.session.complete_chat(state.conversation, state.params, max_tokens=state.max_tokens)
    except ContextOverflowError as error:
        raise ContextOverflowError(error.message, "/undo, /clear or a shorter message makes room") from None
    try:
        with on_interrupt(signal.default_int_handler):
            for piece in completion:
                chat.terminal.write(piece)
    except KeyboardInterrupt:
        completion.close()
        if not completion.text:
            raise
    if not completion.text:
        raise MistralError(
            "the model's answer is empty", "/set seed, /system or another message may change that"
        )
    _end_answer(chat, state, completion)
    return replace(state, conversation=state.conversation.add("assistant", completion.text), last=completion)


def _end_answer(chat: Chat, state: ChatState, completion: Completion) -> None:
    """Go to a new line, and say why when the model was not done."""
    if not completion.text.endswith("\n"):
        chat.terminal.write("\n")
    if completion.finish_reason == "interrupted":
        chat.terminal.note("(stopped)")
    elif completion.finish_reason == "length" and len(completion.token_ids) == state.max_tokens:
        chat.terminal.note(f"(cut off at max_tokens {state.max_tokens})")
    elif completion.finish_reason == "length":
        chat.terminal.note(f"(cut off: the context of {chat.session.max_seq_len} tokens is full)")
