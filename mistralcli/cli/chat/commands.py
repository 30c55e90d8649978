"""The commands of a chat: `/name argument`. Each makes a new state, or raises and changes nothing."""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mistralcli.cli.chat import branch_commands as branches
from mistralcli.cli.chat import file_commands as files
from mistralcli.cli.chat.ledger import ledger_of
from mistralcli.cli.chat.settings import SETTINGS, settings_of, with_setting
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from mistralcli.session import Completion


@dataclass(frozen=True)
class Command:
    """`argument` shows what follows the name: nothing, `FILE` or `N` (needed), or `[TEXT]` (optional)."""

    argument: str
    help: str
    run: Callable[[Chat, ChatState, str], ChatState]


def run_command(chat: Chat, state: ChatState, line: str) -> ChatState:
    """Run the command in `line`, which begins with a slash. Raises MistralError when it cannot be done."""
    name, argument = split_command(line)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise UsageError(
            f"there is no command /{name}; " + (f"the nearest is /{near[0]}" if near else "/help lists them"),
            "to send a message that begins with /, type //",
        )
    command = COMMANDS[name]
    if argument and not command.argument:
        raise UsageError(f"/{name} takes nothing after it, not {argument!r}")
    if not argument and command.argument and not command.argument.startswith("["):
        needed = "the name of a file" if command.argument == "FILE" else f"{command.argument} after it"
        raise UsageError(f"/{name} needs {needed}")
    return command.run(chat, state, argument)


def split_command(line: str) -> tuple[str, str]:
    """`/name argument` into its two parts, the name in lower case; the argument follows the first white space."""
    parts = line.strip().removeprefix("/").split(maxsplit=1)
    name, argument, *_ = (*parts, "", "")
    return name.lower(), argument


def _help(chat: Chat, state: ChatState, argument: str) -> ChatState:
    usages = {f"/{name} {command.argument}".strip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    for usage, text in usages.items():
        chat.terminal.note(f"{usage:<{width}}  {text}")
    chat.terminal.note(_KEYS)
    return state


_KEYS = '''
Alt-Enter begins a new line; so does Enter in a message between """ and """.
Tab completes commands, files and models; Ctrl-R searches what was typed;
Ctrl-G opens the message in $EDITOR.
Ctrl-C stops an answer and keeps what came; at the prompt it clears the line,
and pressed twice it leaves.
To send a message that begins with /, type //.'''


def _exit(chat: Chat, state: ChatState, argument: str) -> ChatState:
    return replace(state, leaving=True)


def _system(chat: Chat, state: ChatState, argument: str) -> ChatState:
    if not argument:
        chat.terminal.note(state.system or "there is no system prompt")
        return state
    system = None if argument == "none" else argument
    chat.terminal.note("the system prompt is " + ("removed" if system is None else "set"))
    return replace(state, system=system)


def _set(chat: Chat, state: ChatState, argument: str) -> ChatState:
    name, value, *_ = (*argument.split(maxsplit=1), "", "")
    name = name.removeprefix("--").replace("-", "_")
    if value or name not in ("", *SETTINGS):
        state = with_setting(state, name, _texts(value) if name == "stop" else _number(name, value))
    for setting, present in settings_of(state).items():
        if name in ("", setting):
            chat.terminal.note(f"{setting:<14}  {_shown(present)}")
    return state


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(json.dumps(text, ensure_ascii=False) for text in value) or "none"
    return "none" if value is None else str(value)


def _number(name: str, text: str) -> int | float | None:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"{text!r} is no value for {name}", "/set NAME VALUE takes a number, or none")


def _texts(text: str) -> list[Any]:
    """One text as it is typed, or in quotes, or several as a JSON list."""
    if text == "none":
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return value if isinstance(value, list) else [value if isinstance(value, str) else text]


def _model(chat: Chat, state: ChatState, argument: str) -> ChatState:
    if argument:
        chat.model.switch(argument)
    chat.terminal.note(chat.model.describe())
    return state


def _tokens(chat: Chat, state: ChatState, argument: str) -> ChatState:
    """By message, and all that the chat format adds to them in one line."""
    session = chat.session
    ledger = ledger_of(session, state)
    n_in_text = 0
    for number, index in enumerate(state.tree.path(), 1):
        message = state.tree.nodes[index].message
        n_tokens = len(session.tokenizer.encode(message.content))
        n_in_text += n_tokens if index in state.sent else 0
        kind = message.role if index in state.sent else "dropped"
        chat.terminal.note(f"{number:>4}  {kind:<9}  {n_tokens:>7,}  {branches.beginning(message.content)}")
    n_system = len(session.tokenizer.encode(state.system)) if state.system else 0
    if n_system:
        chat.terminal.note(f"      system     {n_system:>7,}")
    chat.terminal.note(f"      format     {ledger.n_used - n_in_text - n_system:>7,}")
    for line in ledger.sentences():
        chat.terminal.note(line)
    return state


def _stats(chat: Chat, state: ChatState, argument: str) -> ChatState:
    lines = ["no answer has come since the chat began"] if state.last is None else _turn_stats(state.last)
    ledger = ledger_of(chat.session, state)
    lines.append(f"context   {ledger.n_used:,} of {ledger.n_ctx:,} tokens used")
    lines.append(f"cache     {chat.session.cache_bytes / 1e6:.1f} MB")
    for line in lines:
        chat.terminal.note(line)
    return state


def _turn_stats(turn: "Completion") -> list[str]:
    n_new, n_answer = turn.n_prompt - turn.n_cached, len(turn.token_ids)
    decode = _rate(n_answer - 1, turn.timings.decode_s)  # the first token is the pre-fill's
    return [
        f"prompt    {turn.n_prompt:,} tokens, {turn.n_cached:,} of them in the cache",
        f"pre-fill  {n_new:,} tokens, {_rate(n_new, turn.timings.prefill_s)}",
        f"answer    {n_answer:,} tokens, {decode}, seed {turn.seed}",
    ]


def _rate(n_tokens: int, seconds: float) -> str:
    return f"{n_tokens / seconds:.1f} tokens/s" if n_tokens > 0 and seconds > 0 else "too short to time"


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "help": Command("", "show this", _help),
        "exit": Command("", "leave, as Ctrl-D does", _exit),
        "clear": Command("", "begin again; what was said stays a branch", branches.clear),
        "system": Command("[TEXT]", "show or replace the system prompt; none removes it", _system),
        "set": Command("[NAME VALUE]", "show the settings, or change one of them", _set),
        "model": Command("[NAME]", "show the model, or go on with another one", _model),
        "file": Command("FILE", "add a file to the next message; none takes all back", files.attach),
        "undo": Command("", "take back the last message and its answer", branches.undo),
        "retry": Command("", "answer the last message again", branches.retry),
        "edit": Command("N", "write message N anew; what followed it stays a branch", branches.edit),
        "branch": Command("[N]", "list the branches, or go to one", branches.branch),
        "continue": Command("", "go on with the last answer", branches.go_on),
        "drop": Command("N", "send the model the N oldest turns no more", branches.drop),
        "save": Command("FILE", "write the conversation and the settings to a file", files.save),
        "load": Command("FILE", "go on with a saved chat, or with number N of /sessions", files.load),
        "sessions": Command("", "list the sessions, the newest first", files.sessions),
        "tokens": Command("", "show tokens by message, and what the model sees", _tokens),
        "stats": Command("", "show tokens, speed, context and memory", _stats),
        "export": Command("md|json [FILE]", "write the messages for others to read", files.export),
        "copy": Command("", "put the last answer into the clipboard", files.copy),
    }
)
