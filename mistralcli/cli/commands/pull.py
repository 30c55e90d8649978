"""`mistral pull`: a model from the Hugging Face Hub; its directory goes to stdout."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from mistralcli.cli import console
from mistralcli.errors import UsageError


class _Waits(NamedTuple):
    """How long a failing network is borne with, as the command line says."""

    timeout_s: float
    retries: int


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REVISION]", help="A Hub id such as OWNER/NAME.")],
    token: Annotated[
        str | None,
        typer.Option("--token", help="A token of the Hub (default: HF_TOKEN, else that of `hf auth login`)."),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.1,
            envvar="MISTRAL_CLI_TIMEOUT",
            metavar="SECONDS",
            help="Without data for so long, a connection is taken for stalled.",
        ),
    ] = 30.0,
    retries: Annotated[
        int,
        typer.Option("--retries", min=0, help="Failures in a row, without a byte gained, until it gives up."),
    ] = 8,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask nobody: only say where the model is, if it is here.")
    ] = False,
    quantize: Annotated[
        int | None,
        typer.Option(
            "--quantize", metavar="4|8", help="Keep only a build with so many bits, made as the weights come."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="With --quantize: the build's name, or directory.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what it would take, and where the model would run; fetch nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Download a model from the Hugging Face Hub and print where it is.

    One copy of the weights is taken, into the Hub's shared cache. What is here already is only checked; what is here
    in part is gone on with, whatever stopped it. With --quantize the disk never holds more than the build and one file
    of weights, and the build's name is printed, whose bytes are those of `mistral quantize`.
    """
    if as_json and not dry_run:
        raise UsageError(
            "--json goes with --dry-run", "without it, standard output has the model's directory"
        )
    from mistralcli import store

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it then
    from mistralcli.hub_errors import hub_endpoint

    hub_endpoint()  # with some bad addresses huggingface_hub cannot even be imported
    if output is not None and quantize is None:
        raise UsageError("-o goes with --quantize", "without it, the model goes into the Hub's cache")
    if quantize not in (None, 4, 8):
        raise UsageError(f"--quantize {quantize} is no number of bits that a build can have", "choose 4 or 8")
    if quantize is not None and dry_run:
        raise UsageError("--dry-run does not go with --quantize", "it says the sizes of builds without it")
    if quantize is not None:
        _pull_quantized(store.unaliased(model), token, _Waits(timeout, retries), quantize, output)
    elif dry_run:
        _dry_run(store.unaliased(model), token, timeout, retries, as_json)
    else:
        _pull(store.unaliased(model), token, _Waits(timeout, retries))


def _pull(model: str, token: str | None, waits: _Waits) -> None:
    from mistralcli import hub
    from mistralcli.hub_http import Patience

    patience = Patience(waits.timeout_s, waits.retries)
    with console.progress(f"pulling {model}") as update:
        directory = hub.pull(model, token=token, patience=patience, on_progress=update, on_note=console.note)
    console.write_out(f"{directory}\n")


def _pull_quantized(model: str, token: str | None, waits: _Waits, bits: int, output: str | None) -> None:
    from mistralcli import store
    from mistralcli.cli.commands.quantize import repository_name, short_name
    from mistralcli.cli.quantize_report import summary
    from mistralcli.hub_http import Patience
    from mistralcli.pull_quantized import pull_quantized
    from mistralcli.quantizing import recipe_of
    from quant.scheme import parse_scheme

    recipe = recipe_of(parse_scheme(bits, None, None), None, [], None)
    name = output or f"{repository_name(model, Path(model))}-{short_name(recipe.scheme.name)}"
    with console.progress(f"pulling {model} to {recipe.scheme.name}") as update:
        report = pull_quantized(
            model,
            store.build_directory(name),
            recipe,
            token=token,
            patience=Patience(waits.timeout_s, waits.retries),
            on_progress=update,
            on_note=console.note,
        )
    unchecked = {**report.quality, "left_out": "the source is not kept"}
    console.note(summary(replace(report, quality=unchecked)))
    console.write_out(f"{name}\n")


def _dry_run(model: str, token: str | None, timeout_s: float, retries: int, as_json: bool) -> None:
    """Print the plan; where the Hub shows the listing alone, that is printed before it is said why."""
    from mistralcli.cli.pull_report import as_dict, as_text
    from mistralcli.hub_http import Patience
    from mistralcli.pull_plan import plan_pull

    patience = Patience(timeout_s=timeout_s, retries=retries)
    plan = plan_pull(model, token=token, patience=patience, on_note=console.note)
    console.write_out(json.dumps(as_dict(plan), ensure_ascii=False) + "\n" if as_json else as_text(plan))
    if plan.refusal is not None:
        raise plan.refusal
