"""Decode speed of transformers with bitsandbytes, a 7B model with random weights, and ours beside it in the same run.

    python benchmarks/gpu_bitsandbytes.py [--rounds N]

bitsandbytes' nf4 and LLM.int8() in transformers' own model and `generate`, as its documentation has them, greedy from a
short prompt; then ours in int4 and int8 (`gpu_decode.py`). A figure is the median of the rounds, which take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import bitsandbytes as bnb
import torch
import transformers
from gpu_decode import decode, read_bandwidth
from shapes import MISTRAL_7B
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from mistralcli.config import ModelConfig, hugging_face_config
from quant.schemes.affine import Affine

N_PROMPT, N_TOKENS = 32, 64


def nf4(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to(linear.weight.device)


def int8(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
    return layer.to(linear.weight.device)


def peer(config: ModelConfig, quantized: Callable[[nn.Linear], nn.Module], device: str) -> MistralForCausalLM:
    """transformers' model with random weights; all linears but the head quantized, as bitsandbytes does it."""
    with torch.device(device):
        model = MistralForCausalLM(MistralConfig(**hugging_face_config(config))).bfloat16().eval()
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, quantized(child))
    return model


@torch.no_grad()
def step_s(model: MistralForCausalLM) -> float:
    """Seconds a token, those of the prompt taken off."""
    prompt = torch.arange(100, 100 + N_PROMPT, device=model.device)[None]

    def seconds(n_tokens: int) -> float:
        started = time.perf_counter()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_tokens, min_new_tokens=n_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == N_PROMPT + n_tokens
        assert out[0, -1].item() >= 0  # and so it is there
        return time.perf_counter() - started

    return (seconds(1 + N_TOKENS) - seconds(1)) / N_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    read = read_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"bitsandbytes {bnb.__version__}: plain read {read / 1e12:.2f} TB/s",
        flush=True,
    )
    config = replace(MISTRAL_7B, max_seq_len=512)
    models = {name: peer(config, kind, "cuda") for name, kind in {"nf4": nf4, "LLM.int8()": int8}.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + options.rounds):
        for name, model in models.items():
            times[name].append(step_s(model))
    for name, found in times.items():
        middle = statistics.median(found[1:])  # the first one warms up
        print(
            f"transformers and bitsandbytes, {name}: {1 / middle:.1f} tok/s, {middle * 1e3:.1f} ms",
            flush=True,
        )
    models.clear()
    for scheme in (Affine(4, 128), Affine(8)):
        decode(config, scheme, scheme, 1, [64], read)


if __name__ == "__main__":
    main()
