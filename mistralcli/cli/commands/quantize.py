"""`mistral quantize`: a model to a smaller build of it."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.errors import UsageError
from mistralcli.units import size_text
from quant.files import MISTRAL_TOKENIZERS, matches

if TYPE_CHECKING:
    from quant.checkpoint import BuildReport
    from quant.scheme import Scheme

_TOKENIZERS = (*MISTRAL_TOKENIZERS, "tokenizer.json")


def quantize(
    model: Annotated[str, typer.Argument(help="A Hub id, or a directory with a checkpoint.")],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="The build's name; with a path separator, its directory."),
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="4 or 8 bits a weight (default 4).")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="int4, int8, nf4 or llm.int8 (default: by --bits).")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Weights that share a scale: 32, 64, 128; 0 is a whole row."),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Store a zero point for each group.")
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="Fail (exit 10) if a tensor's relative error is above this."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a build of the same name.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")] = False,
) -> None:
    """Make a smaller build of a model, tensor by tensor; prints the build's name.

    The layers' linears are quantized, an untied head gets 8 bits, embedding and norms stay as they are.
    """
    if max_error is not None and not 0 <= max_error < math.inf:
        raise UsageError(f"--max-error is {max_error}; it must be 0 or more", "0.1 is a tenth of the norm")
    from mistralcli import store
    from quant.scheme import parse_scheme

    chosen = parse_scheme(bits, scheme, group_size, symmetric=not asymmetric)
    source = store.resolve(model)
    name = output or f"{_repository_name(model, source)}-{_short_name(chosen.name)}"
    destination = store.build_directory(name)
    if not quiet and not _has_tokenizer(source):
        console.warn(
            f"{source} has no {' or '.join(_TOKENIZERS)}, and without a tokenizer the build cannot be run"
        )
    report = _build(model, source, destination, chosen, max_error, force, quiet)
    if not quiet:
        console.note(summary(report))
    console.write_out(f"{name}\n")


def _has_tokenizer(directory: Path) -> bool:
    return any(matches(path.name, _TOKENIZERS) for path in directory.iterdir())


def _repository_name(model: str, source: Path) -> str:
    """The model's own name, the repository's or the directory's, in lower case and in what a build's name may have."""
    repository = model.partition("@")[0]
    is_directory = "/" not in repository or Path(model).is_dir()
    name = source.resolve().name if is_directory else Path(repository).name
    return re.sub(r"([^\w.]|\.{2,})+", "-", name.lower(), flags=re.ASCII).strip("-.")[:100] or "model"


def _short_name(scheme: str) -> str:
    """A scheme's name in a build's name, where int4 alone means groups of 128."""
    return scheme.replace("int4-g128", "int4")


def _build(
    model: str,
    source: Path,
    destination: Path,
    scheme: "Scheme",
    max_error: float | None,
    force: bool,
    quiet: bool,
) -> "BuildReport":
    """Quantize with a progress bar on a terminal."""
    from mistralcli.config import hugging_face_config, read_config
    from mistralcli.weights import open_checkpoint
    from quant.checkpoint import quantize_checkpoint
    from quant.scheme import default_head_scheme

    has_own_config = (source / "config.json").is_file()
    with console.progress(f"quantizing to {scheme.name}", quiet=quiet) as update:
        return quantize_checkpoint(
            open_checkpoint(source),
            source,
            destination,
            scheme,
            head_scheme=default_head_scheme(scheme),
            config=None if has_own_config else hugging_face_config(read_config(source)),
            source_name=model,
            revision=source.resolve().name if source.parent.name == "snapshots" else None,
            max_error=max_error,
            replace=force,
            on_progress=update,
        )


def summary(report: "BuildReport") -> str:
    """One line: size before and after, what is stored how, the largest error, how long it took.

    A scheme's groups may not divide the rows of every layer, so what was asked for is not all that there is.
    """
    stored = ", ".join(f"{count} in {name}" for name, count in report.n_layers_by_scheme.items())
    return (
        f"{size_text(report.size_before_bytes)} to {size_text(report.size_after_bytes)}, layers: {stored}, "
        f"{report.bits_per_weight:.2f} bits a quantized weight, "
        f"largest relative error {report.worst_error:.4f} ({report.worst_tensor}), {report.seconds:.0f} s"
    )
