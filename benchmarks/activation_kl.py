"""What rounding activations adds to a quantized model: KL of the next token's distribution, on the CPU.

    python benchmarks/activation_kl.py MODEL TEXT [--tokens 2048]

Decides `quant.kernels.matmul.ROUNDINGS`. The kernels' rounding (by quads, `quant.kernels.activations`) is repeated in
plain PyTorch, so that no GPU is needed. For each scheme: KL(dense ‖ quantized), what the weights' own rounding costs,
and KL(quantized ‖ quantized with rounded activations), in nats a token, with their ratio.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mistralcli.cache import KVCache
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


def load(directory: Path) -> Transformer:
    return load_model(directory, device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def log_probs(model: Transformer, ids: list[int]) -> torch.Tensor:
    """(n_tokens, vocab_size), window by window."""
    found = []
    for start in range(0, len(ids), WINDOW):
        part = torch.tensor(ids[start : start + WINDOW])[None]
        cache = KVCache(model.config, max_seq_len=WINDOW)
        hidden = model(part, torch.arange(part.shape[1])[None], cache)
        found.append(model.logits(hidden[0]).log_softmax(-1))
    return torch.cat(found)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    ids = load_tokenizer(options.model).encode(text[: 8 * options.tokens])[: options.tokens]
    base = log_probs(load(options.model), ids)
    for scheme in (Affine(4, 32), Affine(4, 128), Affine(8)):
        with tempfile.TemporaryDirectory() as folder:
            build = Path(folder) / "build"
            quantize_checkpoint(
                open_checkpoint(options.model), options.model, build, scheme, head_scheme=None
            )
            model = load(build)
            exact = log_probs(model, ids)
            own = kl(base, exact)
            for name, rounding in (("int8", to_int8), ("half", to_half)):
                hooks = with_rounding(model, rounding)
                added = kl(exact, log_probs(model, ids))
                for one in hooks:
                    one.remove()  # type: ignore[attr-defined]
                print(
                    f"{scheme.name}: KL {own:.2e}, {name} activations add {added:.2e}: {added / own:.2%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
