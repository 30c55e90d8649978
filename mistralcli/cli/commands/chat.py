"""`mistral chat`: a conversation in the terminal, or one answer when standard input is none."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import load_session, note_end, read_prompt
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
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from mistralcli.cli.chat.state import ChatState
    from mistralcli.session import Session


def chat(
    context: typer.Context,
    named: Annotated[str | None, typer.Argument(metavar="MODEL", help="The model; the same as -m.")] = None,
    model: Model = None,
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
    from mistralcli.cli.chat.state import ChatState, with_setting
    from mistralcli.conversation import Conversation
    from mistralcli.sampling import SamplingParams
    from mistralcli.session import SessionOptions

    params = SamplingParams(temperature, top_p, top_k, min_p, repeat_penalty, seed)
    state = ChatState(Conversation().with_system(system), params)
    state = with_setting(state, "max_tokens", max_tokens)  # refuses what /set and a saved chat would refuse
    message = None if console.is_terminal(sys.stdin) else read_prompt(None, None)
    options = SessionOptions(ctx, chunk, slack, device, dtype, memory_limit, kv, threads, exact)
    session = load_session(_one_model(context, named, model), options, quiet=False)
    console.note(session.describe())
    if message is None:
        from mistralcli.cli.chat.terminal import chat_at_terminal

        chat_at_terminal(session, state)
    else:
        answer_once(session, state, message)


def _one_model(context: typer.Context, named: str | None, model: str | None) -> str | None:
    """The model named on the command line, else in the environment. Raises UsageError when two are named."""
    source = context.get_parameter_source("model")
    if named is not None and source is not None and source.name == "COMMANDLINE":
        raise UsageError(f"two models are named: {named} and -m {model}", "name one")
    return named or model


def answer_once(session: "Session", state: "ChatState", message: str) -> None:
    """Answer `message` on stdout."""
    conversation = state.conversation.add("user", message)
    completion = session.complete_chat(conversation, state.params, max_tokens=state.max_tokens)
    for piece in completion:
        console.write_out(piece)
    if console.is_terminal(sys.stdout):
        console.write_out("\n")
    note_end(completion)
