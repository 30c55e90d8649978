"""The commands of a chat: `/name argument`. Each makes a new state, or raises and changes nothing."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from mistralcli.cli.chat.file import load_chat, save_chat
from mistralcli.cli.chat.state import SETTINGS, Chat, ChatState, settings_of, with_setting
from mistralcli.conversation import Conversation
from mistralcli.errors import UsageError
from mistralcli.session import Completion


@dataclass(frozen=True)
class Command:
    """`argument` shows what follows the name: nothing, `FILE` (needed) or `[TEXT]` (optional)."""

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
    if not argument and command.argument == "FILE":
        raise UsageError(f"/{name} needs the name of a file")
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
Ctrl-C stops an answer and keeps what came; at the prompt it clears the line,
and pressed twice it leaves.
To send a message that begins with /, type //.'''


def _exit(chat: Chat, state: ChatState, argument: str) -> ChatState:
    return replace(state, leaving=True)


def _clear(chat: Chat, state: ChatState, argument: str) -> ChatState:
    chat.terminal.note("all messages are forgotten")
    return replace(state, conversation=Conversation().with_system(state.system), last=None)


def _system(chat: Chat, state: ChatState, argument: str) -> ChatState:
    if not argument:
        chat.terminal.note(state.system or "there is no system prompt")
        return state
    system = None if argument == "none" else argument
    chat.terminal.note("the system prompt is " + ("removed" if system is None else "set"))
    return replace(state, conversation=state.conversation.with_system(system))


def _set(chat: Chat, state: ChatState, argument: str) -> ChatState:
    name, value, *_ = (*argument.split(maxsplit=1), "", "")
    if value or name not in ("", *SETTINGS):
        state = with_setting(state, name, _number(name, value))
    for setting, number in settings_of(state).items():
        if name in ("", setting):
            chat.terminal.note(f"{setting:<14}  {'none' if number is None else number}")
    return state


def _number(name: str, text: str) -> int | float | None:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"{text!r} is no value for {name}", "/set NAME VALUE takes a number, or none")


def _undo(chat: Chat, state: ChatState, argument: str) -> ChatState:
    conversation = _without_last(state.conversation, 2)
    chat.terminal.note("the last message and its answer are taken back")
    return replace(state, conversation=conversation, last=None)


def _retry(chat: Chat, state: ChatState, argument: str) -> ChatState:
    """The conversation then ends with the user's message, which is answered as a new one would be."""
    return replace(state, conversation=_without_last(state.conversation, 1))


def _without_last(conversation: Conversation, n_messages: int) -> Conversation:
    """`conversation` without the answer (1) or the answer and its question (2) that it ends with."""
    if not conversation.messages or conversation.messages[-1].role != "assistant":
        raise UsageError("there is no answer yet")
    return Conversation(conversation.messages[:-n_messages])


def _save(chat: Chat, state: ChatState, argument: str) -> ChatState:
    path = _file(argument)
    save_chat(path, chat.session.name, state)
    chat.terminal.note(f"saved in {path}")
    return state


def _load(chat: Chat, state: ChatState, argument: str) -> ChatState:
    model, loaded = load_chat(_file(argument))
    if model != chat.session.name:
        chat.terminal.note(f"it was held with {model}, and goes on with {chat.session.name}")
    chat.terminal.note(f"loaded {len(loaded.conversation.messages)} messages")
    return loaded


def _file(argument: str) -> Path:
    """The path that a user means, who may write ~ for a home."""
    try:
        path = Path(argument).expanduser()
    except RuntimeError:
        raise UsageError(f"{argument}: nobody of that name has a home here") from None
    if "\0" in argument:
        raise UsageError(f"{argument} cannot be the name of a file")
    return path


def _stats(chat: Chat, state: ChatState, argument: str) -> ChatState:
    n_used = 0 if state.last is None else state.last.n_prompt + len(state.last.token_ids)
    lines = ["there is no answer yet"] if state.last is None else _turn_stats(state.last)
    lines.append(f"context   {n_used} of {chat.session.max_seq_len} tokens used")
    lines.append(f"cache     {chat.session.cache_bytes / 1e6:.1f} MB")
    for line in lines:
        chat.terminal.note(line)
    return state


def _turn_stats(turn: Completion) -> list[str]:
    n_new, n_answer = turn.n_prompt - turn.n_cached, len(turn.token_ids)
    decode = _rate(n_answer - 1, turn.timings.decode_s)  # the first token is the pre-fill's
    return [
        f"prompt    {turn.n_prompt} tokens, {turn.n_cached} of them in the cache",
        f"pre-fill  {n_new} tokens, {_rate(n_new, turn.timings.prefill_s)}",
        f"answer    {n_answer} tokens, {decode}, seed {turn.seed}",
    ]


def _rate(n_tokens: int, seconds: float) -> str:
    return f"{n_tokens / seconds:.1f} tokens/s" if n_tokens > 0 and seconds > 0 else "too short to time"


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "help": Command("", "show this", _help),
        "exit": Command("", "leave, as Ctrl-D does", _exit),
        "clear": Command("", "forget all messages but the system prompt", _clear),
        "system": Command("[TEXT]", "show or replace the system prompt; none removes it", _system),
        "set": Command("[NAME VALUE]", "show the settings, or change one of them", _set),
        "undo": Command("", "take back the last message and its answer", _undo),
        "retry": Command("", "answer the last message again", _retry),
        "save": Command("FILE", "write the conversation and the settings to a file", _save),
        "load": Command("FILE", "go on with a saved conversation", _load),
        "stats": Command("", "show tokens, speed, context and memory", _stats),
    }
)
