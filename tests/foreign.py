"""Random weights as other tools store them, each beside what it means: made from the formats' formulas alone."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from models import random_checkpoint
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Store = Callable[[str, torch.Tensor, torch.Generator], tuple[Tensors, torch.Tensor]]
"""A weight's name, the weight (of which the shape is taken), a generator; to its stored tensors and what they mean."""

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Unsigned codes (n, m) to int32 words (n, m · bits / 32): nibble or byte k of a word is its column `order[k]`."""
    per_word = 32 // bits
    by_word = codes.long().view(len(codes), -1, per_word)[:, :, order or list(range(per_word))]
    total = (by_word << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def _random(shape: tuple[int, ...], top: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=generator)


def _scales(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 0.02 + 0.01).half()


def gptq(
    bits: int = 4, group: int = 16, *, sym: bool = True, v2: bool = False, act_order: bool = False
) -> Store:
    """GPTQ's tensors; `group` −1 is a whole row."""

    def store(name: str, weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        out, n_in = weight.shape
        size = n_in if group == -1 else group
        n_groups, top = -(-n_in // size), 1 << bits
        columns = torch.randperm(n_in, generator=generator) if act_order else torch.arange(n_in)
        g_idx = (columns // size).int()
        codes, scales = _random((n_in, out), top, generator), _scales((n_groups, out), generator) * 16 / top
        zeros = _random((n_groups, out), top, generator)
        if sym:
            zeros[:] = top // 2
        else:
            zeros[0, :8] = torch.tensor([0, top - 1, 1, top // 2] * 2)  # version 1 stores 0 as all ones
        tensors = {
            "qweight": words(codes.T, bits).T.contiguous(),
            "qzeros": words(zeros if v2 else zeros - 1 & top - 1, bits),
            "scales": scales,
            "g_idx": g_idx,
        }
        return tensors, ((codes - zeros[g_idx.long()]) * scales.float()[g_idx.long()]).T.contiguous()

    return store


def awq(group: int = 16) -> Store:
    def store(name: str, weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        out, n_in = weight.shape
        size = n_in if group == -1 else group
        codes, zeros = (_random((n, out), 16, generator) for n in (n_in, n_in // size))
        scales = _scales((n_in // size, out), generator)
        tensors = {
            "qweight": words(codes, 4, AWQ_ORDER),
            "qzeros": words(zeros, 4, AWQ_ORDER),
            "scales": scales,
        }
        spread = torch.arange(n_in) // size
        return tensors, ((codes - zeros[spread]) * scales.float()[spread]).T.contiguous()

    return store


def fp8(
    block: tuple[int, int] | None, *, exponents: torch.dtype | None = None, suffix: str = "weight_scale_inv"
) -> Store:
    """FP8's tensors. exponents: the type of scales that are powers of 2. A single scale comes with an activation's."""

    def store(name: str, weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        out, n_in = weight.shape
        values = torch.randn(weight.shape, generator=generator).to(torch.float8_e4m3fn)
        n_rows, n_columns = block or (out, n_in)
        shape = (-(-out // n_rows), -(-n_in // n_columns))
        if exponents is None:
            scales = stored = torch.rand(shape, generator=generator) * 0.2 + 0.05
        else:
            powers = torch.randint(119, 126, shape, generator=generator, dtype=torch.uint8)
            scales, stored = 2.0 ** (powers.float() - 127), powers.view(exponents)
        spread = scales.repeat_interleave(n_rows, 0)[:out].repeat_interleave(n_columns, 1)[:, :n_in]
        tensors = {"weight": values, suffix: stored if block else stored.view(())}
        if block is None:
            tensors["activation_scale" if suffix == "weight_scale_inv" else "qscale_act"] = torch.tensor(0.5)
        return tensors, values.float() * spread

    return store


def pack_quantized_with_g_idx(group: int = 16) -> Store:
    """compressed-tensors' int4 with a group for each column."""

    def store(name: str, weight: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        out, n_in = weight.shape
        g_idx = torch.randperm(n_in, generator=generator) // group
        codes, scales = _random((out, n_in), 16, generator), _scales((out, n_in // group), generator)
        tensors = {
            "weight_packed": words(codes, 4),
            "weight_scale": scales,
            "weight_shape": torch.tensor([out, n_in]),
            "weight_g_idx": g_idx.int(),
        }
        return tensors, (codes - 8) * scales.float()[:, g_idx]

    return store


def foreign_checkpoint(
    directory: Path,
    quantization: Mapping[str, Any] | None,
    store: Store,
    *,
    head: bool = False,
    dtype: str = "float32",
    damage: Callable[[Tensors], None] | None = None,
    **changes: Any,
) -> Path:
    """Write `directory`/stored, whose linears are as `store` makes them, and `directory`/dense, which means the same.

    head: whether it is stored so too. damage: changes what is stored. `changes` are those of `random_checkpoint`.
    """
    stored, dense = directory / "stored", directory / "dense"
    random_checkpoint(dense, dtype=dtype, **changes)
    shutil.copytree(dense, stored)
    meant = load_file(dense / "model.safetensors")
    kept: Tensors = {}
    generator = torch.Generator().manual_seed(7)
    for name, weight in list(meant.items()):
        module = name.removesuffix(".weight")
        if module.endswith("_proj") or (head and module == "lm_head"):
            parts, meaning = store(module, weight, generator)
            kept |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
            meant[name] = meaning.to(weight.dtype)
        else:
            kept[name] = weight
    if damage is not None:
        damage(kept)
    save_file(meant, dense / "model.safetensors")
    save_file(kept, stored / "model.safetensors")
    if quantization is not None:
        config = json.loads((stored / "config.json").read_text())
        (stored / "config.json").write_text(json.dumps(config | {"quantization_config": dict(quantization)}))
    return stored
