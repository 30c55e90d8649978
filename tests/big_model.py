"""Write checkpoints of any size quickly, their weights a repeated block of random bytes: for tests of memory.

python tests/big_model.py DIRECTORY      writes a 7B-shaped int4 build (4 GB)
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

_BLOCK_BYTES = 16 << 20
_WIDTHS = {"BF16": 2, "I32": 4, "I64": 8}

Entry = tuple[str, str, tuple[int, ...], bytes]
"""Name, safetensors type, shape, and the bytes that are repeated to fill it."""


def linear_shapes(config: dict[str, object]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of one layer's linears."""
    dim, hidden = int(config["hidden_size"]), int(config["intermediate_size"])  # type: ignore[call-overload]
    head_dim = int(config["head_dim"])  # type: ignore[call-overload]
    q, kv = (int(config[f"num_{kind}_heads"]) * head_dim for kind in ("attention", "key_value"))  # type: ignore[call-overload]
    attention = {"q_proj": (q, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, q)}
    mlp = {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}
    return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}


def bf16(value: float) -> bytes:
    return torch.full((1,), value, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


def dense(name: str, shape: tuple[int, ...], block: bytes) -> Entry:
    return f"{name}.weight", "BF16", shape, block


def quantized(name: str, shape: tuple[int, int], bits: int, group_size: int, block: bytes) -> Iterator[Entry]:
    """The tensors of a symmetric pack-quantized weight whose values have a standard deviation of about 0.02."""
    out_features, in_features = shape
    yield f"{name}.weight_packed", "I32", (out_features, in_features * bits // 32), block
    yield f"{name}.weight_scale", "BF16", (out_features, in_features // group_size), bf16(0.07 / 2**bits)
    yield f"{name}.weight_shape", "I64", (2,), b"".join(n.to_bytes(8, "little") for n in shape)


def entries(config: dict[str, object], int4: bool) -> Iterator[Entry]:
    """All tensors of a checkpoint, dense in bfloat16 or as an int4 build with an int8 head."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_BLOCK_BYTES // 2, generator=generator).mul_(0.02).to(torch.bfloat16)
    noise = values.view(torch.uint8).numpy().tobytes()
    codes = torch.randint(0, 256, (_BLOCK_BYTES,), generator=generator, dtype=torch.uint8).numpy().tobytes()
    dim, vocab = int(config["hidden_size"]), int(config["vocab_size"])  # type: ignore[call-overload]
    yield dense("model.embed_tokens", (vocab, dim), noise)
    yield dense("model.norm", (dim,), bf16(1.0))
    for i in range(int(config["num_hidden_layers"])):  # type: ignore[call-overload]
        layer = f"model.layers.{i}"
        yield dense(f"{layer}.input_layernorm", (dim,), bf16(1.0))
        yield dense(f"{layer}.post_attention_layernorm", (dim,), bf16(1.0))
        for name, shape in linear_shapes(config).items():
            if int4:
                yield from quantized(f"{layer}.{name}", shape, 4, 128, codes)
            else:
                yield dense(f"{layer}.{name}", shape, noise)
    if int4:
        yield from quantized("lm_head", (vocab, dim), 8, 128, codes)
    elif not config["tie_word_embeddings"]:
        yield dense("lm_head", (vocab, dim), noise)


def header_of(tensors: list[Entry]) -> tuple[bytes, int]:
    """The bytes before the data of a file of these tensors, and the size of the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, kind, shape, _ in tensors:
        size = math.prod(shape) * _WIDTHS[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text, offset


def write_file(path: Path, tensors: list[Entry]) -> None:
    """One safetensors file of the entries."""
    with path.open("wb") as file:
        file.write(header_of(tensors)[0])
        for _, kind, shape, block in tensors:
            size = math.prod(shape) * _WIDTHS[kind]
            whole = block * max(1, min(size, _BLOCK_BYTES) // len(block))
            for start in range(0, size, len(whole)):
                file.write(whole[: size - start])


def int4_config() -> dict[str, object]:
    """The quantization_config of `entries(…, int4=True)`."""

    def group(targets: list[str], bits: int) -> dict[str, object]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
        return {"format": "pack-quantized", "targets": targets, "weights": weights}

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {"group_0": group(["Linear"], 4), "group_1": group(["re:.*lm_head$"], 8)},
    }


def write_checkpoint(directory: Path, config: dict[str, object], *, int4: bool = False) -> None:
    """A checkpoint in one file."""
    directory.mkdir(parents=True, exist_ok=True)
    full = config | ({"quantization_config": int4_config()} if int4 else {})
    (directory / "config.json").write_text(json.dumps(full))
    write_file(directory / "model.safetensors", list(entries(config, int4)))


def write_sparse_checkpoint(directory: Path, config: dict[str, object]) -> None:
    """A dense checkpoint whose data is a hole in its file: all zeros, and no room on the disk."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    header, size = header_of(list(entries(config, int4=False)))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), MISTRAL_7B, int4=True)
