"""Options that several commands share, so that a flag means the same everywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from mistralcli.cli.completion import model_names
from mistralcli.errors import UsageError
from mistralcli.units import parse_size


def utf8_text(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """The value, for a callback of Typer. Raises UsageError where its bytes were not UTF-8: Python keeps surrogates."""
    try:
        (value or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{parameter.opts[0]} is not UTF-8 text (character {error.start})",
            "convert it first, for example with iconv",
        ) from None
    return value


def stop_texts(parameter: typer.CallbackParam, values: list[str] | None) -> list[str] | None:
    """As `utf8_text`, for several. Raises UsageError for an empty one too, which would be found everywhere."""
    for value in values or ():
        utf8_text(parameter, value)
        if not value:
            raise UsageError("--stop is empty", "give the text to end before")
    return values


PROMPT_PANEL = "Prompt"
_SAMPLING = "Sampling"
_ENGINE = "Engine"

Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        envvar="MISTRAL_CLI_MODEL",
        help="A Hub id, an alias, a build's name, or a directory.",
        autocompletion=model_names,
    ),
]
NamedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id, an alias, a build's name, or a directory.",
        autocompletion=model_names,
    ),
]
System = Annotated[str | None, typer.Option("--system", help="System prompt.", callback=utf8_text)]
SystemFile = Annotated[
    Path | None,
    typer.Option("--system-file", help="Read the system prompt from a file.", rich_help_panel=PROMPT_PANEL),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the text as it is, without a chat template.", rich_help_panel=PROMPT_PANEL
    ),
]
Tools = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        help="A JSON file of functions; the model's calls are printed as JSON.",
        rich_help_panel=PROMPT_PANEL,
    ),
]
TemplateVars = Annotated[
    list[str] | None,
    typer.Option(
        "--template-vars",
        metavar="NAME=VALUE",
        help="A variable for the chat template, its value in JSON or a text (several times).",
        rich_help_panel=PROMPT_PANEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "-n", "--max-tokens", min=0, help="Stop after so many tokens (default: when the model ends)."
    ),
]

Temperature = Annotated[
    float,
    typer.Option(
        "-t", "--temperature", help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", help="Keep the likeliest tokens up to this probability.", rich_help_panel=_SAMPLING
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        "--top-k", help="Keep so many of the likeliest tokens; 0 is off.", rich_help_panel=_SAMPLING
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", help="Drop tokens below this share of the likeliest's.", rich_help_panel=_SAMPLING
    ),
]
RepeatPenalty = Annotated[
    float,
    typer.Option(
        "--repeat-penalty", help="Above 1, tokens that occurred are less likely.", rich_help_panel=_SAMPLING
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same answer.", rich_help_panel=_SAMPLING)
]

Ctx = Annotated[
    int | None,
    typer.Option(
        "--ctx", help="Context length (default: the model's, as far as it fits).", rich_help_panel=_ENGINE
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option("--chunk", help="Prompt tokens that are processed at once.", rich_help_panel=_ENGINE),
]
Slack = Annotated[
    int | None,
    typer.Option(
        "--slack", help="Cache slots beyond a sliding window; 1 is the least.", rich_help_panel=_ENGINE
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cuda or cpu (default: cuda where usable).", rich_help_panel=_ENGINE),
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16 to compute in.", rich_help_panel=_ENGINE),
]
KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="TYPE",
        help="int8 halves the cache; on the CPU also float32, bfloat16 or float16, its default.",
        rich_help_panel=_ENGINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads of the CPU (default: one a core).", rich_help_panel=_ENGINE),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--no-exact",
        help="On the CPU, do not round activations for int4 and int8 weights: slower.",
        rich_help_panel=_ENGINE,
    ),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        parser=parse_size,
        help="Take no more than this, like 6GB, on the GPU; on the CPU a plan, not enforced.",
        rich_help_panel=_ENGINE,
    ),
]

DEFAULT_TEMPERATURE = 0.7


def _key(option: Any) -> str:
    """The name of an option without dashes, as a settings file has it."""
    info = get_args(option)[1]
    names = (
        str(one) for one in (info.default, *info.param_decls)
    )  # in Annotated, Typer takes the first for a default
    name = next(name for name in names if name.startswith("--"))
    return name.partition("/")[0].removeprefix("--").replace("-", "_")


SETTINGS: Mapping[str, Any] = {
    _key(option): option
    for option in (
        System,
        MaxTokens,
        Temperature,
        TopP,
        TopK,
        MinP,
        RepeatPenalty,
        Seed,
        Ctx,
        Chunk,
        Slack,
        Device,
        DType,
        KV,
        Threads,
        Exact,
        MemoryLimit,
    )
}
"""The options of run and chat that a settings file may set, also one that came with somebody else's project: so none
that writes a file, reads one, or runs something."""
