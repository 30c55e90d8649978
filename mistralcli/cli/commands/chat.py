"""`mistral chat`: a conversation in the terminal, or one answer when standard input is none."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import choose_model, note_end, read_prompt
from mistralcli.cli.completion import model_names
from mistralcli.cli.options import (
    DEFAULT_TEMPERATURE,
    KV,
    Chunk,
    Ctx,
    Device,
    DType,
    Exact,
    MaxTokens,
    MemoryLimit,
    MinP,
    Model,
    RepeatPenalty,
    Seed,
    Slack,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from mistralcli.errors import DiskError, UsageError

if TYPE_CHECKING:
    from mistralcli.cli.chat.loading import LoadedModel
    from mistralcli.cli.chat.session_file import Resumed
    from mistralcli.cli.chat.sessions import SessionStore
    from mistralcli.cli.chat.state import ChatState


def chat(
    context: typer.Context,
    named: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The model; the same as -m.", autocompletion=model_names),
    ] = None,
    model: Model = None,
    go_on: Annotated[
        bool, typer.Option("-c", "--continue", help="Go on with the last chat, by default with its model.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as they are, not as Markdown.")
    ] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = None,
    ctx: Ctx = None,
    chunk: Chunk = None,
    slack: Slack = None,
    device: Device = None,
    dtype: DType = None,
    memory_limit: MemoryLimit = None,
    kv: KV = None,
    threads: Threads = None,
    exact: Exact = False,
) -> None:
    """Talk with a model. /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    When standard input is no terminal, all of it is one message: it is answered on standard output.
    """
    from mistralcli.cli.chat.loading import LoadedModel
    from mistralcli.cli.chat.sessions import SessionStore
    from mistralcli.cli.chat.state import ChatState
    from mistralcli.run_options import SessionOptions
    from mistralcli.store import sessions_directory

    state = _with_flags(ChatState(), context.params)
    options = SessionOptions(ctx, chunk, slack, device, dtype, memory_limit, kv, threads, exact)
    message = None if console.is_terminal(sys.stdin) else read_prompt(None, None)
    name = _one_model(context, named, model)
    store = SessionStore(sessions_directory())
    last = _last_session(store) if go_on else None
    if last is not None:
        given = _given(context)
        state = _with_flags(last.state, given)
        name = name if given.keys() & {"named", "model"} else last.model
    loaded = LoadedModel(choose_model(name, quiet=False), options)
    if message is not None:
        answer_once(loaded, store, state, message)
        return
    from mistralcli.cli.chat.terminal import chat_at_terminal

    chat_at_terminal(loaded, store, state, plain=plain)


def _with_flags(state: "ChatState", flags: Mapping[str, Any]) -> "ChatState":
    """`state` with what the command line says. Raises UsageError for what /set and a saved chat would refuse."""
    from mistralcli.cli.chat.settings import SETTINGS, with_setting

    for name in SETTINGS:
        if name in flags:
            state = with_setting(state, name, flags[name])
    return replace(state, system=flags["system"]) if "system" in flags else state


def _given(context: typer.Context) -> dict[str, Any]:
    """The flags that are on the command line: those win over what the last chat was set to, and defaults do not."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: context.params[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }


def _last_session(store: "SessionStore") -> "Resumed | None":
    """The last chat, and that it goes on; None where there was none, which is said."""
    info = store.latest()
    if info is None:
        console.note("there is no chat to go on with, so a new one begins")
        return None
    last = store.resume(info.path)
    for note in last.notes:
        console.note(note)
    return last


def _one_model(context: typer.Context, named: str | None, model: str | None) -> str | None:
    """The model named on the command line, else in the environment. Raises UsageError when two are named."""
    source = context.get_parameter_source("model")
    if named is not None and source is not None and source.name == "COMMANDLINE":
        raise UsageError(f"two models are named: {named} and -m {model}", "name one")
    return named or model


def answer_once(model: "LoadedModel", store: "SessionStore", state: "ChatState", message: str) -> None:
    """Answer `message` on stdout; `mistral chat --continue` can go on with it."""
    session = model.session()
    state = replace(state, continues=False, draft="").with_message(message)
    completion = session.complete_chat(
        state.conversation, state.params, max_tokens=state.max_tokens, stop=state.stop
    )
    for piece in completion:
        console.write_out(piece)
    if console.is_terminal(sys.stdout):
        console.write_out("\n")
    note_end(completion)
    if completion.text:
        answered = state.with_answer(completion.text, unfinished=completion.finish_reason != "stop")
        try:
            store.record(answered, model.name)
        except DiskError as error:
            console.show_error(error)
