"""The chat loop: read an input, run it as a command or have it answered, until the user leaves.

It knows no terminal library and no tensors: `Chat` has the model that answers, the terminal that shows and the store
that saves.
"""

from dataclasses import replace

from mistralcli.cli.chat.answers import answered, save
from mistralcli.cli.chat.attachments import attached_line, with_attachments
from mistralcli.cli.chat.branch_commands import where
from mistralcli.cli.chat.commands import run_command
from mistralcli.cli.chat.file import rescue_chat
from mistralcli.cli.chat.inputs import message_in
from mistralcli.cli.chat.kept_cache import QUICK_BYTES, keep_cache
from mistralcli.cli.chat.ledger import Toolbar
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.cli.console import error_text, on_interrupt
from mistralcli.errors import MistralError


def run_repl(chat: Chat, state: ChatState) -> None:
    """Chat until /exit or Ctrl-D, which return, two Ctrl-C, which raise KeyboardInterrupt, or a signal (SystemExit).

    The session is saved after every step, and where that failed elsewhere at the end. While an answer comes Ctrl-C
    stops it; the signal does nothing else, so that none takes the conversation with it. An error that nobody foresaw is
    raised on, with the conversation saved.
    """
    with on_interrupt(lambda number, frame: None):
        if state.tree.at is not None:
            chat.terminal.note(f"the chat goes on: {where(state)}")
        if state.attached:
            chat.terminal.note(attached_line(state.attached))
        try:
            state = _until_left(chat, state)
        except KeyboardInterrupt:
            keep_cache(chat)
            raise
        except SystemExit:  # whoever sent the signal may not wait for long
            keep_cache(chat, QUICK_BYTES)
            raise
        keep_cache(chat)


def _until_left(chat: Chat, state: ChatState) -> ChatState:
    while not state.leaving:
        try:
            text = chat.terminal.read(state.draft, Toolbar(chat.model, state))
            if text.strip():
                state = step(chat, replace(state, draft=""), text)
                save(chat, state)
        except EOFError:
            break
        except BaseException as error:
            if isinstance(error, Exception) or chat.store.is_failing:
                _rescue(chat, state)
            raise
    if chat.store.is_failing:
        _rescue(chat, state)
    return state


def _rescue(chat: Chat, state: ChatState) -> None:
    """Say where the conversation is, if there is one: in its session, else in a file of its own."""
    if not state.tree.nodes:
        return
    try:
        chat.store.record(state, chat.model.name)
        chat.terminal.note("the conversation is saved: mistral chat --continue goes on with it")
    except MistralError:
        try:
            path = rescue_chat(chat.model.name, state)
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
            save(chat, replace(state, draft=text))  # so that no end of the process takes it along
            after = state.with_message(with_attachments(state.attached, message))
        return answered(chat, after) if after.awaits_answer else after
    except MistralError as error:
        chat.terminal.note(error_text(error))
    except KeyboardInterrupt:
        chat.terminal.note("(stopped before the answer began)")
    return state if message is None else replace(state, draft=text)
