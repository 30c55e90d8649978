"""Small checkpoints for tests of hub and store, real and whole; and what a user needs to pull them."""

import json
from pathlib import Path

import numpy as np
from hub_server import HubServer
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "mistral",
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 96,
    "dtype": "bfloat16",
}
PARAMS = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 64,
    "vocab_size": 96,
    "norm_eps": 1e-5,
}


def write_weights(path: Path, seed: int = 0, n_values: int = 50_000) -> None:
    """A whole safetensors file with one tensor."""
    values = np.random.default_rng(seed).standard_normal(n_values, dtype=np.float32)
    save_file({f"weight.{seed}": values}, path)


def write_checkpoint(directory: Path, *, n_shards: int = 1, seed: int = 0) -> Path:
    """A checkpoint in Hugging Face's layout, with a tokenizer and a licence."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.model").write_bytes(b"pieces")
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "LICENSE").write_text("Do what you like.")
    if n_shards == 1:
        write_weights(directory / "model.safetensors", seed)
        return directory
    shards = {f"weight.{i}": f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)}
    for number, name in enumerate(shards.values()):
        write_weights(directory / name, number)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return directory


def online(home: Path, server: HubServer) -> dict[str, str]:
    """The variables of a user who pulls from `server` into a cache below `home`."""
    return {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}
