"""A build of ours as llama.cpp reads it: the same codes and scales, so that both engines compute the same function.

    python benchmarks/gguf_build.py BUILD FILE.gguf

int4 becomes Q4_0 and int8 becomes Q8_0, code by code. Larger groups than theirs of 32 columns repeat their scale, which
goes from bfloat16 to float16. What is dense stays bfloat16, norms are float32. There is no vocabulary: a peer in a
benchmark is fed ids.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from mistralcli.checkpoint_files import Checkpoint
from mistralcli.config import ModelConfig, read_config
from mistralcli.errors import MistralError
from mistralcli.weights import open_checkpoint
from quant.packing import words

BLOCK = 32
"""Columns that share a scale in Q4_0 and Q8_0."""

_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(build: Path, path: Path) -> None:
    """Write the model in the directory `build` to `path`, one tensor in memory at a time.

    Raises:
        MistralError: a weight is neither dense nor symmetric int4 or int8 in groups of a multiple of 32 columns.
    """
    checkpoint, config = open_checkpoint(build), read_config(build)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, config)
    names = dict(_names(config))
    for name, theirs in names.items():
        shape, kind = _stored_as(checkpoint, name)
        n_bytes = int(np.prod(shape)) * (4 if kind == Type.F32 else 1)
        dtype = np.dtype(np.float32 if kind == Type.F32 else np.uint8)
        writer.add_tensor_info(f"{theirs}.weight", shape, dtype, n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        writer.write_tensor_data(_content(checkpoint, config, name))
        checkpoint.release()
    writer.close()


def rotary_rows(n_heads: int, head_dim: int) -> torch.Tensor:
    """Which row of our wq or wk each of llama.cpp's is.

    It rotates the pairs (2i, 2i + 1) of a "llama" model, where Hugging Face's weights pair i with i + head_dim / 2.
    """
    return torch.arange(n_heads * head_dim).view(n_heads, 2, head_dim // 2).transpose(1, 2).flatten()


def blocks_of(packed: torch.Tensor, scales: torch.Tensor, in_features: int) -> np.ndarray[Any, Any]:
    """The bytes of Q4_0 or Q8_0 rows, (rows, bytes), of symmetric codes as a build stores them.

    packed: (rows, words) int32. A block of Q4_0 is its float16 scale and 16 bytes, of which byte j has column j in its
    low and column j + 16 in its high nibble, as code + 8. A block of Q8_0 has 32 int8.
    """
    rows, n_blocks = len(packed), in_features // BLOCK
    stored = packed.contiguous().view(torch.uint8).view(rows, n_blocks, -1)
    if stored.shape[2] == BLOCK // 2:
        columns = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(2)  # (rows, n_blocks, 32)
        codes = columns[..., :16] | columns[..., 16:] << 4
    else:
        codes = stored ^ 128
    repeated = scales.to(torch.float16).repeat_interleave(n_blocks // scales.shape[1], dim=1)
    return torch.cat((repeated.unsqueeze(2).view(torch.uint8), codes), dim=2).flatten(1).numpy()


def _describe(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Names of modules in Hugging Face's layout, and in llama.cpp's."""
    yield "model.embed_tokens", "token_embd"
    for i in range(config.n_layers):
        for ours, theirs in (_NORMS | _LINEARS).items():
            yield f"model.layers.{i}.{ours}", f"blk.{i}.{theirs}"
    yield "model.norm", "output_norm"
    if not config.tied_embeddings:
        yield "lm_head", "output"


def _stored_as(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], Type]:
    """The shape of a weight, in bytes unless it is a norm's, and its type in the GGUF file."""
    if f"{name}.weight" in checkpoint.names():
        shape = checkpoint.spec(f"{name}.weight").shape
        return (shape, Type.F32) if len(shape) == 1 else ((shape[0], 2 * shape[1]), Type.BF16)
    if f"{name}.weight_packed" not in checkpoint.names() or f"{name}.weight_zero_point" in checkpoint.names():
        raise MistralError(f"{name} is neither dense nor symmetric int4 or int8")
    rows, in_features = checkpoint.load(f"{name}.weight_shape").tolist()
    n_groups = checkpoint.spec(f"{name}.weight_scale").shape[1]
    if in_features % (n_groups * BLOCK):
        raise MistralError(f"{name} has {n_groups} groups in {in_features} columns, not multiples of {BLOCK}")
    bits = 4 if checkpoint.spec(f"{name}.weight_packed").shape[1] == words(in_features, 4) else 8
    return (rows, in_features // BLOCK * (2 + 4 * bits)), Type.Q4_0 if bits == 4 else Type.Q8_0


def _content(checkpoint: Checkpoint, config: ModelConfig, name: str) -> np.ndarray[Any, Any]:
    """The tensor in the file; rows of q and k in llama.cpp's order."""
    n_heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.rpartition(".")[2])
    rows = slice(None) if n_heads is None else rotary_rows(n_heads, config.head_dim)
    if f"{name}.weight" in checkpoint.names():
        weight = checkpoint.load(f"{name}.weight")[rows]
        if weight.ndim == 1:
            return weight.float().numpy()
        return weight.bfloat16().contiguous().view(torch.uint8).numpy()
    in_features = int(checkpoint.load(f"{name}.weight_shape")[1])
    packed, scales = (checkpoint.load(f"{name}.weight_{what}")[rows] for what in ("packed", "scale"))
    return blocks_of(packed, scales, in_features)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
