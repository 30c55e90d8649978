"""`mistral run`: one prompt, one answer; only the completion goes to stdout."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    stop_texts,
    utf8_text,
)
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from mistralcli.session import Completion, Session


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; `-` or none reads standard input.", callback=utf8_text),
    ] = None,
    model: Model = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a file; `-` is standard input.")
    ] = None,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    max_tokens: MaxTokens = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", help="End before this text (may be given several times).", callback=stop_texts
        ),
    ] = None,
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")] = False,
) -> None:
    """Answer one prompt, from the argument, a file or a pipe.

    With both a prompt and piped input, the input is context after the prompt: `mistral run "Summarize:" < notes.txt`.
    """
    text = read_prompt(prompt, file)
    if raw and system is not None:
        raise UsageError("--raw uses no template, so --system has nowhere to go", "leave one of them out")
    from mistralcli.sampling import SamplingParams
    from mistralcli.session import SessionOptions

    params = SamplingParams(temperature, top_p, top_k, min_p, repeat_penalty, seed)
    options = SessionOptions(ctx, chunk, slack, device, dtype, memory_limit, kv, threads, exact)
    session = load_session(model, options, quiet)
    token_ids = session.tokenizer.encode(text, bos=True) if raw else _chat_ids(session, system, text)
    completion = session.complete(
        token_ids, params, max_tokens=max_tokens, stop=stop or (), continues_text=raw
    )
    for piece in completion:
        if not as_json:
            console.write_out(piece)
    if as_json:
        console.write_out(json.dumps(as_dict(session, completion), ensure_ascii=False) + "\n")
    elif console.is_terminal(sys.stdout):
        console.write_out("\n")
    if not quiet:
        note_end(completion)


def _chat_ids(session: "Session", system: str | None, text: str) -> list[int]:
    from mistralcli.conversation import Conversation

    return session.tokenizer.encode_chat(Conversation().with_system(system).add("user", text))


def as_dict(session: "Session", completion: "Completion") -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {"prompt_tokens": completion.n_prompt, "completion_tokens": len(completion.token_ids)},
        "timings": {
            "load_s": round(session.load_s, 4),
            "prefill_s": round(completion.timings.prefill_s, 4),
            "decode_s": round(completion.timings.decode_s, 4),
        },
        "seed": completion.seed,
        "model": session.name,
    }
