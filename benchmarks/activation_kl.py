"""What rounding activations adds to a quantized model: KL of the next token's distribution, and perplexity.

    python benchmarks/activation_kl.py MODEL TEXT [--tokens 2048]

For each scheme: KL(dense ‖ quantized), what the weights' own rounding costs, and KL(quantized ‖ quantized with rounded
activations), in nats a token, with their ratio, and how the perplexity of the text changes, with the standard error of
that by the differences token by token. The roundings are

    quads to int8, quads to half   the GPU's kernels (`quant.kernels.activations`), repeated in plain PyTorch so that no
                                   GPU is needed; decides `quant.kernels.matmul.ROUNDINGS`
    the CPU's kernels              themselves (`quant.kernels.cpu.rounding`), with what this processor has

and what they are compared with is what `--exact` runs, so MISTRAL_CLI_KERNELS must not turn the kernels off.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from distributions import kl_by_token, log_probs
from torch import nn

from mistralcli.model import Transformer
from mistralcli.tokenizer import load_tokenizer
from mistralcli.weights import load_model, open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.schemes.affine import Affine, AffineLinear

WINDOW = 512


def to_int8(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Rounded to 127 steps of the largest of each `columns`."""
    quads = x.unflatten(-1, (-1, columns))
    scale = quads.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((quads / scale + 0.5).floor() * scale).flatten(-2)


def to_half(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Rounded to float16 after division by the largest of each `columns`."""
    quads = x.unflatten(-1, (-1, columns))
    scale = quads.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return ((quads / scale).half().float() * scale).flatten(-2)


def load(directory: Path, exact: bool = True) -> Transformer:
    return load_model(directory, device=torch.device("cpu"), dtype=torch.float32, exact=exact)


def nats(found: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Those of each token in what `log_probs` found, but for the first token of each window."""
    targets = torch.tensor(ids[1:])
    all_of_them = -found[:-1].gather(-1, targets[:, None])[:, 0]
    return all_of_them[torch.arange(1, len(ids)) % WINDOW != 0]


def perplexity_change(rounded: torch.Tensor, exact: torch.Tensor, ids: list[int]) -> tuple[float, float]:
    """By what share it is larger than the exact one, and the standard error of that."""
    more = nats(rounded, ids) - nats(exact, ids)
    return math.expm1(more.mean()), float(more.std()) / math.sqrt(len(more))


def with_rounding(model: Transformer, rounding: Callable[[torch.Tensor, int], torch.Tensor]) -> list[object]:
    """Round what every quantized layer reads; returns the hooks."""

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert isinstance(layer, AffineLinear)
        return (rounding(inputs[0].float(), 128 // layer.scheme.bits), *inputs[1:])

    return [
        module.register_forward_pre_hook(hook)
        for module in model.modules()
        if isinstance(module, AffineLinear)
    ]


def rounded_log_probs(
    exact: Transformer, prepared: Transformer, ids: list[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What each rounding makes of the log-probabilities, by its name."""
    for name, rounding in (("quads to int8", to_int8), ("quads to half", to_half)):
        hooks = with_rounding(exact, rounding)
        yield name, log_probs(exact, ids, WINDOW)
        for one in hooks:
            one.remove()  # type: ignore[attr-defined]
    yield "the CPU's kernels", log_probs(prepared, ids, WINDOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    if os.environ.get("MISTRAL_CLI_KERNELS"):
        parser.error("MISTRAL_CLI_KERNELS is set, and the kernels are what is measured")
    text = options.text.read_text(encoding="utf-8")
    ids = load_tokenizer(options.model).encode(text[: 8 * options.tokens])[: options.tokens]
    base = log_probs(load(options.model), ids, WINDOW)
    for scheme in (Affine(4, 32), Affine(4, 128), Affine(8)):
        with tempfile.TemporaryDirectory() as folder:
            build = Path(folder) / "build"
            quantize_checkpoint(
                open_checkpoint(options.model), options.model, build, scheme, head_scheme=None
            )
            model = load(build)
            exact = log_probs(model, ids, WINDOW)
            own = float(kl_by_token(base, exact).mean())
            for name, rounded in rounded_log_probs(model, load(build, exact=False), ids):
                added = float(kl_by_token(exact, rounded).mean())
                change, error = perplexity_change(rounded, exact, ids)
                print(
                    f"{scheme.name}: KL {own:.2e}, {name} add {added:.2e}: {added / own:.2%}; "
                    f"perplexity {change:+.2%} ± {error:.2%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
