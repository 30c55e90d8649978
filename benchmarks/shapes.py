"""The shapes that the benchmarks measure with."""

from dataclasses import replace

from mistralcli.config import ModelConfig

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
    sliding_windows=(None,) * 32,
    tied_embeddings=False,
    eos_ids=(),
    dtype="bfloat16",
)

MISTRAL_1B = replace(
    MISTRAL_7B, dim=2048, n_layers=16, head_dim=64, hidden_dim=8192, sliding_windows=(None,) * 16
)
"""The same kind of model with 1.04 billion weights in its matmuls."""
