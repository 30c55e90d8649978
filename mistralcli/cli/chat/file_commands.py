"""The commands that read and write: files, sessions, the clipboard."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from mistralcli.cli.chat.attachments import as_block, read_attachment
from mistralcli.cli.chat.branch_commands import beginning, where
from mistralcli.cli.chat.clipboard import copy_text
from mistralcli.cli.chat.file import load_chat, save_chat
from mistralcli.cli.chat.kept_cache import keep_cache
from mistralcli.cli.chat.ledger import ledger_of
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.errors import DiskError, UsageError

MOST_LISTED = 20


def attach(chat: Chat, state: ChatState, argument: str) -> ChatState:
    if argument == "none":
        chat.terminal.note("no file goes with the next message")
        return replace(state, attached=())
    session = chat.session
    file = read_attachment(_file(argument))
    n_tokens = len(session.tokenizer.encode(as_block(file)))
    n_left = ledger_of(session, state).n_left
    if n_tokens >= session.max_seq_len:
        raise UsageError(
            f"{argument} has {n_tokens:,} tokens, and the context {session.max_seq_len:,} in all",
            "give the part that matters, or ask for a longer --ctx",
        )
    chat.terminal.note(f"{file.name} goes with the next message: {n_tokens:,} tokens of {n_left:,} left")
    return replace(state, attached=(*state.attached, file))


def save(chat: Chat, state: ChatState, argument: str) -> ChatState:
    path = _file(argument)
    save_chat(path, chat.model.name, state)
    chat.terminal.note(f"saved in {path}")
    return state


def load(chat: Chat, state: ChatState, argument: str) -> ChatState:
    """A number is that of a session as `/sessions` lists them now, unless there is a file of that name."""
    keep_cache(chat)
    if argument.isascii() and argument.isdigit() and not _file(argument).exists():
        listed = chat.store.listing(MOST_LISTED)
        if not 1 <= int(argument[:9]) <= len(listed):
            raise UsageError(f"there is no session {argument}", "/sessions lists them")
        resumed = chat.store.resume(listed[int(argument) - 1].path)
        model, loaded, notes = resumed.model, resumed.state, resumed.notes
    else:
        (model, loaded), notes = load_chat(_file(argument)), ()
    if model != chat.model.name:
        chat.terminal.note(f"it was held with {model}, and goes on with {chat.model.name}")
    chat.terminal.note(f"loaded {where(loaded)}")
    for note in notes:
        chat.terminal.note(note)
    return loaded


def sessions(chat: Chat, state: ChatState, argument: str) -> ChatState:
    listed = chat.store.listing(MOST_LISTED)
    if not listed:
        chat.terminal.note("there is no session yet")
    for number, info in enumerate(listed, 1):
        mark = "*" if info.path == chat.store.path else " "
        when = f"{info.changed:%Y-%m-%d %H:%M}"
        words = f"{info.n_messages:>3} messages  {info.model}  {beginning(info.first)}"
        chat.terminal.note(f"{mark} {number:>2}  {when}  {words}")
    return state


def export(chat: Chat, state: ChatState, argument: str) -> ChatState:
    """Markdown or JSON, into a file that is not there yet."""
    kind, name, *_ = (*argument.split(maxsplit=1), "", "")
    if kind not in ("md", "json"):
        raise UsageError(f"/export writes md or json, not {kind!r}")
    if not state.tree.path():
        raise UsageError("there are no messages yet")
    path = _file(name or f"chat-{datetime.now():%Y%m%d-%H%M%S}.{kind}")
    content = _markdown(chat, state) if kind == "md" else _json(chat, state)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise UsageError(f"{path} exists", "choose another name, or remove it first") from None
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror}") from None
    chat.terminal.note(f"written to {path}")
    return state


def _markdown(chat: Chat, state: ChatState) -> str:
    parts = [f"# A chat with {chat.model.name}"]
    if state.system:
        parts.append(f"## System\n\n{state.system}")
    parts += [f"## {m.role.capitalize()}\n\n{m.content.strip()}" for m in state.tree.messages()]
    return "\n\n".join(parts) + "\n"


def _json(chat: Chat, state: ChatState) -> str:
    """As OpenAI's API takes messages."""
    system = [{"role": "system", "content": state.system}] if state.system else []
    messages = system + [{"role": m.role, "content": m.content} for m in state.tree.messages()]
    return json.dumps({"model": chat.model.name, "messages": messages}, ensure_ascii=False, indent=1) + "\n"


def copy(chat: Chat, state: ChatState, argument: str) -> ChatState:
    answers = [m.content for m in state.tree.messages() if m.role == "assistant"]
    if not answers:
        raise UsageError("there is no answer yet")
    chat.terminal.note(copy_text(answers[-1].strip("\n")))
    return state


def _file(argument: str) -> Path:
    """The path that a user means, who may write ~ for a home."""
    try:
        path = Path(argument).expanduser()
    except RuntimeError:
        raise UsageError(f"{argument}: nobody of that name has a home here") from None
    if "\0" in argument:
        raise UsageError(f"{argument} cannot be the name of a file")
    return path
