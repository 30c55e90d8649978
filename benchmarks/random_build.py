"""A build with random int4 codes in Mistral 7B's shapes, for benchmarks that start from files.

python benchmarks/random_build.py DIRECTORY [N_LAYERS]      4.0 GB with all 32 layers
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from shapes import MISTRAL_7B

from mistralcli.config import ModelConfig, hugging_face_config
from mistralcli.demo import demo_directory
from quant.safetensors_file import SafetensorsWriter
from quant.schemes.affine import Affine
from quant.tensors import TensorSpec

LAYERS, HEAD = Affine(4, 128), Affine(8, 128)


def write_build(directory: Path, n_layers: int = 32) -> Path:
    """Write it, with a window of 4096, and return its one file of weights."""
    config = replace(MISTRAL_7B, n_layers=n_layers, sliding_windows=(4096,) * n_layers, eos_ids=(2,))
    return write_build_of(config, directory, LAYERS, HEAD)


def write_build_of(config: ModelConfig, directory: Path, layers: Affine, head: Affine) -> Path:
    """Write one of any shape and symmetric schemes, with the demo's tokenizer; returns its one file of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_directory() / name, directory / name)
    stated = hugging_face_config(config) | {"quantization_config": _quantization(layers, head)}
    (directory / "config.json").write_text(json.dumps(stated))
    specs = dict(_specs(config, layers, head))
    path = directory / "model.safetensors"
    with SafetensorsWriter(path, specs) as writer:
        for name, spec in specs.items():
            bits = (head if "lm_head" in name else layers).bits
            writer.write(name, _content(name, spec, specs, bits))
    return path


def _specs(config: ModelConfig, layers: Affine, head: Affine) -> Iterator[tuple[str, TensorSpec]]:
    dim, hidden, vocab = config.dim, config.hidden_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, q),
        "mlp.gate_proj": (hidden, dim),
        "mlp.up_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
    }
    yield "model.embed_tokens.weight", TensorSpec((vocab, dim), torch.bfloat16)
    yield "model.norm.weight", TensorSpec((dim,), torch.bfloat16)
    for i in range(config.n_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{norm}.weight", TensorSpec((dim,), torch.bfloat16)
        for name, shape in shapes.items():
            for suffix, spec in layers.specs(*shape, torch.bfloat16).items():
                yield f"model.layers.{i}.{name}.{suffix}", spec
    for suffix, spec in head.specs(vocab, dim, torch.bfloat16).items():
        yield f"lm_head.{suffix}", spec


def _content(name: str, spec: TensorSpec, specs: dict[str, TensorSpec], bits: int) -> torch.Tensor:
    """Random codes, scales and norms that keep activations at their size, and true shapes."""
    if name.endswith("weight_packed"):
        return torch.randint(-(2**31), 2**31 - 1, spec.shape, dtype=spec.dtype)
    if name.endswith(("weight_shape", "weight_scale")):
        rows, words = specs[f"{name.rpartition('.')[0]}.weight_packed"].shape
        in_features = words * 32 // bits
        if name.endswith("weight_shape"):
            return torch.tensor([rows, in_features])
        deviation = 4.6 if bits == 4 else 74  # of the codes
        return torch.full(spec.shape, in_features**-0.5 / deviation, dtype=spec.dtype)
    return (
        torch.ones(spec.shape, dtype=spec.dtype)
        if len(spec.shape) == 1
        else torch.randn(spec.shape).to(spec.dtype)
    )


def _quantization(layers: Affine, head: Affine) -> dict[str, object]:
    def group(targets: list[str], scheme: Affine) -> dict[str, object]:
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": scheme.group_size,
        }
        return {"format": "pack-quantized", "targets": targets, "weights": weights}

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {"group_0": group(["Linear"], layers), "group_1": group(["re:.*lm_head$"], head)},
    }


if __name__ == "__main__":
    print(write_build(Path(sys.argv[1]), *map(int, sys.argv[2:3])))
