"""`mistral eval`: how well a model predicts a text, and how far a build is from its source."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import read_text
from mistralcli.cli.options import Device, NamedModel, Threads

if TYPE_CHECKING:
    from mistralcli.evaluate import Divergence, Estimate, Perplexity
    from mistralcli.layerwise import LayerwiseModel
    from mistralcli.tokenizer import Tokenizer

_File = Annotated[Path, typer.Argument(help="Any text in UTF-8; - is standard input.")]
_Window = Annotated[
    int | None,
    typer.Option(
        "--window", help="Tokens that are run together (default 2048, or the model's context if shorter)."
    ),
]
_Stride = Annotated[
    int | None,
    typer.Option("--stride", help="Tokens from one window to the next (default: the window, no overlap)."),
]
_MaxTokens = Annotated[
    int | None, typer.Option("-n", "--max-tokens", min=3, help="Take only so many tokens of the text.")
]
_DType = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16 to compute in.", rich_help_panel="Engine")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")]


def ppl(
    model: NamedModel,
    file: _File,
    window: _Window = None,
    stride: _Stride = None,
    max_tokens: _MaxTokens = None,
    device: Device = None,
    dtype: _DType = "float32",
    threads: Threads = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Measure a model's perplexity on a text: exp of the mean negative log-likelihood of its tokens.

    Layer by layer, in the memory of one layer, with weights as they are stored and float32 arithmetic.
    The standard error is that of blocks of neighbouring tokens.
    """
    from mistralcli import evaluate

    opened = _open(model, device, dtype, threads)
    ids = evaluate.text_ids(_tokenizer(opened), _read(file), max_tokens)
    with console.steps(f"measuring {model}", quiet=quiet) as update:
        found = evaluate.measure_perplexity(opened, ids, window=window, stride=stride, on_progress=update)
    facts = {"model": model, "file": str(file), **_perplexity(found)}
    rows = {"perplexity": _with_error(found.perplexity, found.stderr), "tokens scored": str(found.n_tokens)}
    _show(facts, rows, as_json)


def kl(
    model: NamedModel,
    file: _File,
    base: Annotated[str, typer.Option("--base", help="The model to compare with: a build's source.")],
    window: _Window = None,
    stride: _Stride = None,
    max_tokens: _MaxTokens = None,
    device: Device = None,
    dtype: _DType = "float32",
    threads: Threads = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Measure how far a model's distributions of the next token are from a base's: KL(base ‖ model), in nats a token.

    Layer by layer, in the memory of one layer, with weights as they are stored and float32 arithmetic.
    Standard errors are those of blocks of neighbouring tokens.
    """
    from mistralcli import evaluate

    opened, opened_base = (_open(name, device, dtype, threads) for name in (model, base))
    tokenizer = _tokenizer(opened)
    evaluate.require_same_tokens(tokenizer, _tokenizer(opened_base))
    ids = evaluate.text_ids(tokenizer, _read(file), max_tokens)
    with console.steps(f"comparing {model} with {base}", quiet=quiet) as update:
        found = evaluate.measure_divergence(
            opened, opened_base, ids, window=window, stride=stride, on_progress=update
        )
    facts = {"model": model, "base": base, "file": str(file), **_divergence(found)}
    _show(facts, _divergence_rows(found), as_json)


COMMANDS: Mapping[str, Callable[..., None]] = {"ppl": ppl, "kl": kl}
"""The commands of `mistral eval`."""


def _open(name: str, device: str | None, dtype: str, threads: int | None) -> "LayerwiseModel":
    """The model, also a build that failed its gate: what it lost is what is asked."""
    from mistralcli import store
    from mistralcli.device import choose_device, choose_dtype
    from mistralcli.layerwise import LayerwiseModel
    from mistralcli.threads import set_threads

    set_threads(threads)
    where = choose_device(device)
    return LayerwiseModel(store.resolve(name), choose_dtype(dtype, where), where)


def _tokenizer(model: "LayerwiseModel") -> "Tokenizer":
    from mistralcli.tokenizer import load_fitting_tokenizer

    return load_fitting_tokenizer(model.directory, model.config.vocab_size)


def _read(file: Path) -> str:
    return console.read_in() if str(file) == "-" else read_text(file)


def _show(facts: Mapping[str, Any], rows: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        console.write_out(json.dumps(facts, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        width = max(map(len, rows)) + 2
        console.write_out("".join(f"{name:<{width}}{value}\n" for name, value in rows.items()))


def _perplexity(found: "Perplexity") -> dict[str, Any]:
    return {
        "perplexity": found.perplexity,
        "stderr": found.stderr,
        "nll": found.nll.mean,
        "nll_stderr": found.nll.stderr,
        "n_tokens": found.n_tokens,
        "window": found.window,
        "stride": found.stride,
    }


def _divergence(found: "Divergence") -> dict[str, Any]:
    return {
        **_perplexity(found.model),
        "base_perplexity": found.base.perplexity,
        "base_stderr": found.base.stderr,
        "kl_mean": found.kl.mean,
        "kl_stderr": found.kl.stderr,
        "kl_median": found.kl_median,
        "kl_p99": found.kl_p99,
        "kl_max": found.kl_max,
        "top1_agreement": found.top1_agreement.mean,
        "top1_stderr": found.top1_agreement.stderr,
    }


def _divergence_rows(found: "Divergence") -> dict[str, str]:
    return {
        "KL, mean": _with_error(found.kl.mean, found.kl.stderr),
        "KL, median": f"{found.kl_median:.4g}",
        "KL, 99th percentile": f"{found.kl_p99:.4g}",
        "KL, largest": f"{found.kl_max:.4g}",
        "same likeliest token": _percent(found.top1_agreement),
        "perplexity": _with_error(found.model.perplexity, found.model.stderr),
        "the base's": _with_error(found.base.perplexity, found.base.stderr),
        "tokens scored": str(found.model.n_tokens),
    }


def _with_error(value: float, stderr: float) -> str:
    """A value and its standard error.

    >>> _with_error(27.60829, 2.27852), _with_error(0.012345, 0.00071)
    ('27.61 ± 2.3', '0.01234 ± 0.00071')
    """
    return f"{value:.4g} ± {stderr:.2g}"


def _percent(share: "Estimate") -> str:
    return f"{share.mean:.2%} ± {share.stderr:.2%}"
