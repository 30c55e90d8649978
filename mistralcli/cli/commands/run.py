"""`mistral run`: one prompt, one answer; only the completion goes to stdout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast

import typer

from mistralcli.cli.answers import load_session, read_prompt
from mistralcli.cli.options import (
    DEFAULT_TEMPERATURE,
    KV,
    PROMPT_PANEL,
    Chunk,
    Ctx,
    Device,
    DType,
    Exact,
    MaxTokens,
    MemoryLimit,
    MinP,
    Model,
    Raw,
    RepeatPenalty,
    Seed,
    Slack,
    System,
    SystemFile,
    Temperature,
    TemplateVars,
    Threads,
    Tools,
    TopK,
    TopP,
    stop_texts,
    utf8_text,
)
from mistralcli.cli.run_batch import batch_settings, require_output, run_batch
from mistralcli.cli.run_one import Overflow, Prompt, Request, answer_one
from mistralcli.cli.run_output import Form
from mistralcli.cli.run_prompt import read_extras, read_grammar, read_system
from mistralcli.errors import UsageError

_JOBS = 8
"""Sequences of a batch, which share each reading of the weights: more gain little on a CPU and take more cache."""

_OUTPUT = "Output"


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
    system_file: SystemFile = None,
    raw: Raw = False,
    fim: Annotated[
        bool,
        typer.Option(
            "--fim", help="Fill in what comes between the prompt and --suffix.", rich_help_panel=PROMPT_PANEL
        ),
    ] = False,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            help="With --fim: the text after the gap.",
            callback=utf8_text,
            rich_help_panel=PROMPT_PANEL,
        ),
    ] = None,
    tools: Tools = None,
    template_vars: TemplateVars = None,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(
            "--prefix-cache",
            help="Keep what the system prompt computes in this file, and take it from there the next time.",
            rich_help_panel=PROMPT_PANEL,
        ),
    ] = None,
    overflow: Annotated[
        str,
        typer.Option(
            "--overflow",
            metavar="error|head|tail",
            help="When the prompt is too long: fail, or keep the head or the tail of its text and say so.",
            rich_help_panel=PROMPT_PANEL,
        ),
    ] = "error",
    max_tokens: MaxTokens = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", help="End before this text (may be given several times).", callback=stop_texts
        ),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            "--schema", help="Answer in JSON that fits the JSON schema in a file.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex",
            help="Answer what this expression matches.",
            callback=utf8_text,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            "--grammar", help="Answer what the grammar in a file allows (Lark).", rich_help_panel=_OUTPUT
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object instead of the text.", rich_help_panel=_OUTPUT),
    ] = False,
    ndjson: Annotated[
        bool,
        typer.Option(
            "--ndjson", help="Print a line of JSON for each piece, then --json's.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            min=0,
            max=100,
            metavar="K",
            help="In JSON: each token's log-probability, and the K likeliest.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch",
            metavar="IN.jsonl",
            help='Answer a prompt a line, like {"prompt": "Hi"}; with -o, and -j at a time.',
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="With --batch: the file for the answers.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            max=256,
            help="With --batch: so many together (8).",
            rich_help_panel=_OUTPUT,
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
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")] = False,
) -> None:
    """Answer one prompt, from the argument, a file or a pipe.

    With both a prompt and piped input, the input is context after the prompt: `mistral run "Summarize:" < notes.txt`.
    """
    from mistralcli.run_options import SamplingParams, SessionOptions

    params = SamplingParams(temperature, top_p, top_k, min_p, repeat_penalty, seed)
    options = SessionOptions(ctx, chunk, slack, device, dtype, memory_limit, kv, threads, exact)
    answers_fit = read_grammar(schema, regex, grammar)
    system = read_system(system, system_file)
    if batch is not None:
        single: dict[str, object] = {
            "a prompt": prompt is not None,
            "--file": file,
            "--raw": raw,
            "--fim": fim,
            "--tools": tools,
            "--json": as_json,
        }
        single |= {
            "--ndjson": ndjson,
            "--logprobs": logprobs is not None,
            "--suffix": suffix is not None,
            "--overflow": overflow != "error",
            "--template-vars": template_vars,
            "--prefix-cache": prefix_cache,
        }
        _refuse_beside_batch(single, output)
        settings = batch_settings(model, options, params, system, max_tokens, stop or (), answers_fit)
        return run_batch(model, options, settings, batch, cast(Path, output), jobs or _JOBS, quiet)
    for name, value in {"-o": output, "-j": jobs}.items():
        if value is not None:
            raise UsageError(f"{name} is for --batch", f"add --batch, or leave {name} out")
    request = Request(
        Prompt(
            read_prompt(prompt, file),
            system,
            raw,
            _suffix(fim, suffix),
            read_extras(tools, template_vars or ()),
        ),
        params,
        _overflow(overflow),
        max_tokens,
        tuple(stop or ()),
        answers_fit,
        logprobs,
        _form(as_json, ndjson, logprobs),
        prefix_cache,
    )
    answer_one(load_session(model, options, quiet), request, quiet=quiet)
    return None


def _refuse_beside_batch(given: Mapping[str, object], output: Path | None) -> None:
    """Raise UsageError for a flag of one prompt, or without a place for the answers."""
    for name, value in given.items():
        if value:
            raise UsageError(f"--batch and {name} exclude each other", "leave one of them out")
    if output is None:
        raise UsageError("--batch needs a file for the answers", "name it with -o")
    require_output(output)


def _form(as_json: bool, ndjson: bool, logprobs: int | None) -> Form:
    if as_json and ndjson:
        raise UsageError("--json and --ndjson exclude each other", "leave one of them out")
    if logprobs is not None and not (as_json or ndjson):
        raise UsageError("--logprobs has nowhere to go in a text", "add --json or --ndjson")
    return "json" if as_json else "ndjson" if ndjson else "text"


def _overflow(value: str) -> Overflow:
    for known in ("error", "head", "tail"):
        if value == known:
            return known
    raise UsageError(
        f"--overflow is {value}; it must be error, head or tail",
        "without it a prompt that is too long is refused",
    )


def _suffix(fim: bool, suffix: str | None) -> str | None:
    """The text after the gap, with --fim."""
    if suffix is not None and not fim:
        raise UsageError("--suffix is for --fim", "add --fim, or leave --suffix out")
    return (suffix or "") if fim else None
