"""Small random models for tests, in memory and on disk, and transformers' view of the same weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizer_files import official_file
from transformers import AutoModelForCausalLM, MinistralConfig, MistralConfig, PreTrainedModel

from mistralcli.cache import KVCache
from mistralcli.config import ModelConfig
from mistralcli.device import DTYPES
from mistralcli.model import Transformer
from mistralcli.weights import load_model

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A Mistral of 100 thousand parameters, its weights wide enough for logits that differ clearly."""


MISTRAL_7B = ModelConfig(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    hidden_dim=14336,
    vocab_size=32768,
    norm_eps=1e-5,
    rope_theta=1e6,
    max_seq_len=32768,
    sliding_windows=(4096,) * 32,
    tied_embeddings=False,
    eos_ids=(),
    dtype="bfloat16",
)
"""With a sliding window of 4,096."""


def random_checkpoint(
    directory: Path, *, dtype: str = "float32", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Write a random checkpoint in Hugging Face's layout; returns transformers' model of it, in float32.

    `changes` replace values of `SMALL`; with `layer_types` it is a Ministral.
    """
    torch.manual_seed(seed)
    values = SMALL | changes
    config = MinistralConfig(**values) if "layer_types" in values else MistralConfig(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Our model of a checkpoint directory, on the CPU."""
    return load_model(directory, device=torch.device("cpu"), dtype=dtype)


def all_logits(model: Transformer, ids: list[int], *, chunk: int, slack: int) -> torch.Tensor:
    """Logits after each id, (n_tokens, vocab_size), the ids given in chunks."""
    cache = KVCache(model.config, max_seq_len=len(ids), slack=slack)
    rows = []
    for start in range(0, len(ids), chunk):
        part = torch.tensor([ids[start : start + chunk]])
        positions = torch.arange(start, start + part.shape[1])[None]
        rows.append(model.logits(model(part, positions, cache))[0])
    return torch.cat(rows)


def mean_nll(model: Transformer, ids: list[int]) -> float:
    """The mean negative log-likelihood of each id after those before it, in nats."""
    logits = all_logits(model, ids, chunk=512, slack=512)
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))


def token_ids(n_tokens: int, vocab_size: int = SMALL["vocab_size"], seed: int = 1) -> list[int]:
    """Random ids, none of which is a control token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (n_tokens,), generator=generator).tolist()


def tiny_instruct_checkpoint(directory: Path) -> None:
    """A random windowed model with Mistral's v3 tokenizer: what it says is nonsense, and the same every time."""
    random_checkpoint(
        directory,
        vocab_size=32768,
        sliding_window=64,
        max_position_embeddings=1024,
        dtype="bfloat16",
        initializer_range=0.1,
    )
    shutil.copy(official_file("mistral_instruct_tokenizer_240323.model.v3"), directory / "tokenizer.model")
