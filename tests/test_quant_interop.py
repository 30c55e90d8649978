"""Other tools' quantized checkpoints have the weights that those tools say, and they read our builds unchanged."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import all_logits, load, random_checkpoint, token_ids
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    PreTrainedModel,
)

from mistralcli.weights import loaded_sizes, open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.keep import KeepRule
from quant.linear import QuantizedLinear
from quant.scheme import Scheme, default_head_scheme, schemes_of
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8

CPU = torch.device("cpu")
FOREIGN_AFFINE = [
    "ct_int4_chan_asym",
    "ct_int4_g128_lmhead",
    "ct_int4_g128_sym",
    "ct_int4_g128_sym_f32",
    "ct_int4_g32_asym",
    "ct_int8_chan_sym",
    "ct_int8_g128_sym",
    "ct_mixed_down8",
]
DEQUANTIZED = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
"""How transformers 5.23 and 5.24 are made to read asymmetric weights. By default they make room for them as
compressed-tensors 0.19 and 0.20 say, which forget that zero points are packed: they find [32, 8] in the file where
they want [256, 8], and stop. The file is as compressed-tensors writes it."""

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.1,
}


@pytest.fixture(autouse=True)
def _activations_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tools do not round them, as the CPU's kernels do: what is compared here is what a file means."""
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")


def layers(directory: Path, model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear, QuantizedLinear]]:
    """The quantized layers of a checkpoint: name, the place in transformers' dense model, our layer."""
    config = json.loads((directory / "config.json").read_text())
    scheme_of = schemes_of(config["quantization_config"])
    tensors = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        scheme = scheme_of(name) if isinstance(module, torch.nn.Linear) else None
        if scheme is not None:
            linear = scheme.linear(module.in_features, module.out_features)
            linear.load_stored({key: tensors[f"{name}.{key}"] for key in linear.stored()}, CPU)
            yield name, module, linear


def dequantized(directory: Path, base: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' dense model, made like `base`, of a quantized checkpoint's weights as we read them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    quantized = {name for name, _, _ in layers(directory, model)}
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict(
        {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in quantized}, strict=False
    )
    for _, module, linear in layers(directory, model):
        module.weight.data = linear.dense_rows(0, linear.out_features).to(dtype)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(ids[None]).logits[0].float()
    return out


@pytest.mark.parametrize("name", FOREIGN_AFFINE)
def test_compressed_tensors_checkpoints_give_their_golden_logits(name: str, shared_dir: Path) -> None:
    interop = shared_dir / "data" / "interop"
    golden = load_file(interop / f"{name}.golden.safetensors")
    dtype = torch.float32 if name.endswith("f32") else torch.bfloat16
    logits = logits_of(dequantized(interop / name, interop / "base_bf16", dtype), golden["input_ids"])
    # The weights are the same bits; a CPU without bfloat16 instructions may sum in another order.
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(logits, golden["logits"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FOREIGN_AFFINE)
def test_compressed_tensors_weights_are_those_of_the_library(name: str, shared_dir: Path) -> None:
    directory = shared_dir / "data" / "interop" / name
    options = DEQUANTIZED if name.endswith("asym") else {}
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options).eval()
    logits_of(theirs, torch.tensor([1]))  # packed weights are unpacked by the first forward pass
    seen = 0
    for layer, module, linear in layers(directory, theirs):
        dense = linear.dense_rows(0, linear.out_features)
        assert torch.equal(dense.to(module.weight.dtype), module.weight), layer
        seen += 1
    assert seen == (15 if "lmhead" in name else 14)


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_fp4", "bnb_int8"])
def test_bitsandbytes_checkpoints_give_the_golden_logits_of_their_dense_weights(
    name: str, shared_dir: Path
) -> None:
    interop = shared_dir / "data" / "interop"
    golden = load_file(interop / f"{name}.golden.safetensors")
    model = dequantized(interop / name, interop / "base_bf16", torch.bfloat16)
    logits = logits_of(model, golden["input_ids"])
    torch.testing.assert_close(logits, golden["logits_dequantized_bf16"], atol=0.06, rtol=0)


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_fp4", "bnb_int8"])
def test_bitsandbytes_layers_multiply_as_the_library_does(name: str, shared_dir: Path) -> None:
    directory = shared_dir / "data" / "interop" / name
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    x = torch.randn((3, 512), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(shared_dir / "data" / "interop" / "base_bf16")
    # Its module for the CPU rounds inputs and absmax of 4-bit weights to bfloat16 where that is fast; we don't.
    roundoff = 1e-6 if name == "bnb_int8" else 3 * 2.0**-8
    with torch.no_grad():
        for layer, _, linear in layers(directory, dense):
            inputs = x[:, : linear.in_features]
            ours, library = linear(inputs), theirs.get_submodule(layer)(inputs)
            magnitude = inputs.abs() @ linear.dense_rows(0, linear.out_features).abs().T
            assert ((ours - library).abs() <= roundoff * magnitude).all(), layer


@pytest.mark.parametrize("name", [*FOREIGN_AFFINE, "bnb_nf4", "bnb_fp4", "bnb_int8"])
def test_other_tools_checkpoints_give_their_golden_logits_in_our_model(name: str, shared_dir: Path) -> None:
    interop = shared_dir / "data" / "interop"
    golden = load_file(interop / f"{name}.golden.safetensors")
    ids = golden["input_ids"]
    logits = all_logits(load(interop / name), ids.tolist(), chunk=16, slack=16)
    # The goldens are computed in bfloat16, which alone is 0.06 at the unquantized model and up to 0.12 here, of
    # logits up to 3.8; LLM.int8 also rounds the inputs of each layer to 8 bits.
    tolerance = {"ct_int4_g128_sym_f32": 1e-4, "bnb_int8": 0.3}.get(name, 0.15)
    torch.testing.assert_close(logits, golden["logits"], atol=tolerance, rtol=0)
    if name != "bnb_int8":
        exact = logits_of(dequantized(interop / name, interop / "base_bf16", torch.float32), ids)
        torch.testing.assert_close(logits, exact, atol=1e-4, rtol=0)


def test_nested_absmax_is_read(shared_dir: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn((40, 512), generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()} | {
        "weight": packed
    }
    linear = Float4("nf4", nested=True).linear(512, 40)
    assert linear.stored().keys() == stored.keys()
    linear.load_stored(stored, CPU)
    theirs = dequantize_4bit(packed, state)
    assert torch.equal(linear.dense_rows(0, 40).bfloat16(), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        {
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_quant_storage": torch.float32,
            "bnb_4bit_use_double_quant": True,
        },
    ],
    ids=["double quant", "stored as bfloat16", "both, as float32"],
)
def test_what_transformers_saves_with_bitsandbytes_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    random_checkpoint(tmp_path / "source", **SHAPE)
    quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=quantization, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "saved")
    seen = 0
    for name, module, linear in layers(tmp_path / "saved", theirs):
        dense = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(linear.dense_rows(0, linear.out_features).to(dense.dtype), dense), name
        seen += 1
    assert seen == 21
    ours = load(tmp_path / "saved")
    loaded = sum(tensor.nbytes for tensor in [*ours.parameters(), *ours.buffers()])
    assert loaded <= loaded_sizes(tmp_path / "saved", torch.float32, "cpu").total <= 1.05 * loaded


def build(
    source: Path, destination: Path, scheme: Scheme, keep: Sequence[KeepRule] = (), **changes: Any
) -> Path:
    options = {"head_scheme": default_head_scheme(scheme)} | changes
    quantize_checkpoint(open_checkpoint(source), source, destination, scheme, keep=keep, **options)
    return destination


MIXED = [
    KeepRule("*.down_proj", "8"),
    KeepRule("model.layers.1.self_attn.*", "8"),
    KeepRule("*.0.*.o_proj", "dense"),
]


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        (Affine(4, 128), {"head_scheme": Affine(8, 128)}),
        (Affine(4, 64), {"head_scheme": Affine(4, 128)}),
        (Affine(4, 64), {"keep": MIXED}),
        (Affine(4, 32, symmetric=False), {}),
        (Affine(8, 128, symmetric=False), {}),
    ],
    ids=["head int8 by group", "head int4", "mixed", "int4-g32-asym", "int8-g128-asym"],
)
def test_compressed_tensors_itself_reads_our_builds(
    scheme: Affine, changes: dict[str, Any], tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    random_checkpoint(tmp_path / "source", dtype="bfloat16", **SHAPE)
    directory = build(tmp_path / "source", tmp_path / "build", scheme, **changes)
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = load_file(directory / "model.safetensors")
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "source"))
    ours = {name: linear for name, _, linear in layers(directory, dense)}
    apply_quantization_config(dense, QuantizationConfig.model_validate(stated))
    theirs = {
        name: module for name, module in dense.named_modules() if hasattr(module, "quantization_scheme")
    }
    assert theirs.keys() == ours.keys()
    for name, module in theirs.items():
        state = {key: tensors[f"{name}.{key}"] for key in ours[name].stored()}
        read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
            state, module.quantization_scheme
        )["weight"]
        rows = ours[name].dense_rows(0, ours[name].out_features)
        assert torch.equal(rows.to(read.dtype), read), name


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"keep": MIXED}, {Affine(4, 64), Affine(8)}),
        ({"head_scheme": Affine(8, 128)}, {Affine(4, 64), Affine(8, 128)}),
    ],
    ids=["mixed", "head int8 by group"],
)
def test_transformers_reads_builds_of_several_schemes(
    changes: dict[str, Any], kinds: set[Affine], tmp_path: Path
) -> None:
    random_checkpoint(tmp_path / "source", **SHAPE)
    directory = build(tmp_path / "source", tmp_path / "build", Affine(4, 64), **changes)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids = token_ids(24)
    logits = logits_of(theirs, torch.tensor(ids))
    found = {linear.scheme for _, _, linear in layers(directory, theirs)}  # type: ignore[attr-defined]
    assert kinds <= found
    ours = all_logits(load(directory), ids, chunk=24, slack=24)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "scheme",
    [
        Affine(4, 128),
        Affine(4, 64),
        Affine(4, 32),
        Affine(4),
        Affine(8),
        Affine(8, 128),
        Affine(4, 128, symmetric=False),
        Affine(4, 64, symmetric=False),
        Affine(4, 32, symmetric=False),
        Affine(4, None, symmetric=False),
        Affine(8, 128, symmetric=False),
    ],
    ids=lambda scheme: scheme.name,
)
def test_transformers_reads_our_builds_with_the_same_weights_and_logits(
    scheme: Affine, dtype: str, tmp_path: Path
) -> None:
    random_checkpoint(tmp_path / "source", dtype=dtype, **SHAPE)
    directory = build(tmp_path / "source", tmp_path / "build", scheme)
    options = {} if scheme.symmetric else DEQUANTIZED
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options).eval()
    ids = token_ids(24)
    logits = logits_of(theirs, torch.tensor(ids))
    assert sum(1 for _ in layers(directory, theirs)) == 3 * 7 + scheme.symmetric
    for layer, module, linear in layers(directory, theirs):
        dense = linear.dense_rows(0, linear.out_features)
        assert torch.equal(dense.to(module.weight.dtype), module.weight), layer
    if dtype == "float32":
        torch.testing.assert_close(
            all_logits(load(directory), ids, chunk=24, slack=24), logits, atol=1e-4, rtol=0
        )


def test_transformers_reads_a_build_whose_layers_had_to_fall_back(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source", **SHAPE | {"hidden_size": 192, "intermediate_size": 272})
    directory = build(tmp_path / "source", tmp_path / "build", Affine(4, 128))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids = token_ids(24)
    logits = logits_of(theirs, torch.tensor(ids))
    sizes = {linear.scheme.group_size for _, _, linear in layers(directory, theirs)}  # type: ignore[attr-defined]
    assert sizes == {64, 128, None}
    torch.testing.assert_close(
        all_logits(load(directory), ids, chunk=24, slack=24), logits, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("scheme", [Float4(), LlmInt8()], ids=lambda scheme: scheme.name)
def test_transformers_reads_our_bitsandbytes_builds(scheme: Scheme, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source", **SHAPE)
    directory = build(tmp_path / "source", tmp_path / "build", scheme)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids = token_ids(24)
    logits = logits_of(theirs, torch.tensor(ids))
    ours = all_logits(load(directory), ids, chunk=24, slack=24)
    # It computes nf4 in bfloat16 where that is fast, and LLM.int8 on inputs of 8 bits, of which float noise now
    # and then moves one to the next code.
    torch.testing.assert_close(ours, logits, atol=0.05 * float(logits.abs().max()), rtol=0)
