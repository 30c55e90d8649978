"""`mistral quantize`: a model to a smaller build of it."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.completion import model_names
from mistralcli.errors import DiskError, NotEnoughMemoryError, UsageError
from mistralcli.units import parse_size
from quant.files import MISTRAL_TOKENIZERS, matches

if TYPE_CHECKING:
    from mistralcli.quantizing import Job
    from quant.checkpoint import BuildReport

_TOKENIZERS = (*MISTRAL_TOKENIZERS, "tokenizer.json")
_BITS = "Bits"
_MAKING = "Making"


@dataclass(frozen=True)
class _Limits:
    """What a build must keep to: its largest relative error and KL, if it is checked, and its memory in bytes."""

    max_error: float | None
    max_kl: float | None
    check: bool
    max_ram: int | None


def quantize(
    model: Annotated[
        str, typer.Argument(help="A Hub id, or a directory with a checkpoint.", autocompletion=model_names)
    ],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="The build's name; with a path separator, its directory."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="4 or 8 bits a weight (default 4).", rich_help_panel=_BITS)
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help="int4, int8, nf4 or llm.int8 (default: by --bits).", rich_help_panel=_BITS
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Weights that share a scale: 32, 64, 128; 0 is a whole row.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    asymmetric: Annotated[
        bool,
        typer.Option("--asymmetric", help="Store a zero point for each group.", rich_help_panel=_BITS),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="PATTERN=BITS",
            help="4, 8 or dense for the linears that a glob, or re: and an expression, means; repeatable.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    target_size: Annotated[
        int | None,
        typer.Option(
            "--target-size",
            metavar="SIZE",
            parser=parse_size,
            help="Give 8 bits to the linears that lose most at 4, up to this size, like 4.2GB.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="How codes are chosen: rtn, rtn-w, hqq, awq, gptq or awq-gptq (default: rtn-w for int4, else rtn).",
            rich_help_panel=_MAKING,
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="FILE",
            help="The text that awq and gptq look at, or self: what the model writes.",
            rich_help_panel=_MAKING,
        ),
    ] = None,
    calib_tokens: Annotated[
        int | None,
        typer.Option(
            "--calib-tokens", help="How much of it (default 16384 tokens).", rich_help_panel=_MAKING
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            help="Fail (exit 10) if a tensor's relative error is above this.",
            rich_help_panel=_MAKING,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the build with its source on a short text.",
            rich_help_panel=_MAKING,
        ),
    ] = True,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            help="Fail (exit 10) if the build's mean KL from its source is above this, in nats a token.",
            rich_help_panel=_MAKING,
        ),
    ] = None,
    max_ram: Annotated[
        int | None,
        typer.Option(
            "--max-ram",
            metavar="SIZE",
            parser=parse_size,
            help="Take no more memory than this, like 4GB, or refuse (exit 7).",
            rich_help_panel=_MAKING,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a half-made build of that name.", rich_help_panel=_MAKING),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a build of the same name.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the build would hold and take; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")] = False,
) -> None:
    """Make a smaller build of a model, layer by layer; prints the build's name.

    The layers' linears are quantized, an untied head gets 8 bits, embedding and norms stay as they are.
    """
    if max_error is not None and not 0 <= max_error < math.inf:
        raise UsageError(f"--max-error is {max_error}; it must be 0 or more", "0.1 is a tenth of the norm")
    if max_kl is not None and not (check and 0 <= max_kl < math.inf):
        raise UsageError(
            f"--max-kl is {max_kl}; it must be 0 or more, and goes with --check",
            "0.1 is what good 4 bits keep to",
        )
    if as_json and not dry_run:
        raise UsageError("--json goes with --dry-run", "without it, standard output has the build's name")
    from mistralcli import store
    from mistralcli.quantizing import open_job, recipe_of
    from quant.scheme import parse_scheme

    chosen = parse_scheme(bits, scheme, group_size, symmetric=not asymmetric)
    recipe = recipe_of(chosen, method, keep or [], target_size)
    model = store.unaliased(model)  # whose name the build and its card get
    source = store.resolve(model)
    name = output or f"{repository_name(model, source)}-{short_name(chosen.name)}"
    destination = store.build_directory(name)
    if not quiet and not _has_tokenizer(source):
        console.warn(
            f"{source} has no {' or '.join(_TOKENIZERS)}, and without a tokenizer the build cannot be run"
        )
    job = open_job(model, source, recipe, calib, calib_tokens)
    if max_ram is not None:
        job.require_memory(max_ram, check=check)
    if dry_run:
        return _describe(job, name, destination, check, as_json, quiet)
    limits = _Limits(max_error, max_kl, check, max_ram)
    report = _build(job, name, destination, limits, resume, force, quiet)
    if not quiet:
        from mistralcli.cli.quantize_report import summary

        console.note(summary(report))
    console.write_out(f"{name}\n")
    return None


def _describe(job: "Job", name: str, destination: Path, check: bool, as_json: bool, quiet: bool) -> None:
    """Print the plan. For a target size the model is read to decide on bits."""
    from mistralcli.cli.quantize_report import Planned, plan_dict, plan_text
    from quant.staging import free_bytes

    with console.progress("measuring what 4 bits cost", quiet=quiet) as update:
        plan = job.decided_plan(on_progress=update)
    existing = next(parent for parent in destination.absolute().parents if parent.exists())
    planned = Planned(
        name, destination, job.recipe.method.name, plan, job.peak(check=check), free_bytes(existing)
    )
    console.write_out(
        json.dumps(plan_dict(planned), ensure_ascii=False) + "\n" if as_json else plan_text(planned)
    )


def _build(
    job: "Job",
    name: str,
    destination: Path,
    limits: _Limits,
    resume: bool,
    force: bool,
    quiet: bool,
) -> "BuildReport":
    """Quantize with a progress bar on a terminal; says what becomes of a half-made build."""
    from quant.staging import can_be_resumed

    if not quiet and resume != can_be_resumed(destination):
        console.note(
            f"there is no half-made {name} to go on with: starting it"
            if resume
            else f"starting over: the half-made {name} is discarded, --resume would have gone on with it"
        )
    try:
        with console.progress(f"quantizing to {job.recipe.scheme.name}", quiet=quiet) as update:
            return job.build(
                destination,
                limits.max_error,
                max_kl=limits.max_kl,
                check=limits.check,
                max_bytes=limits.max_ram,
                replace=force,
                resume=resume,
                on_progress=update,
            )
    except (DiskError, NotEnoughMemoryError, KeyboardInterrupt):
        if can_be_resumed(destination) and not quiet:
            console.note(f"what is done of {name} stays: the same command with --resume goes on with it")
        raise


def _has_tokenizer(directory: Path) -> bool:
    return any(matches(path.name, _TOKENIZERS) for path in directory.iterdir())


def repository_name(model: str, source: Path) -> str:
    """The model's own name, the repository's or the directory's, in lower case and in what a build's name may have."""
    repository = model.partition("@")[0]
    is_directory = "/" not in repository or Path(model).is_dir()
    name = source.resolve().name if is_directory else Path(repository).name
    return re.sub(r"([^\w.]|\.{2,})+", "-", name.lower(), flags=re.ASCII).strip("-.")[:100] or "model"


def short_name(scheme: str) -> str:
    """A scheme's name in a build's name, where int4 alone means groups of 128."""
    return scheme.replace("int4-g128", "int4")
