"""A `quantization_config` says which scheme a layer has, by the rules of the library that wrote it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import MistralError, UsageError
from quant.scheme import Scheme, quantization_config, schemes_of
from quant.schemes.act_order import ActOrder
from quant.schemes.affine import Affine
from quant.schemes.awq import Awq
from quant.schemes.dense import DenseAffine
from quant.schemes.float4 import Float4
from quant.schemes.fp8 import Fp8
from quant.schemes.gptq import Gptq
from quant.schemes.llm_int8 import LlmInt8

Q, DOWN, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head"
UP, NORM, EMBEDDING = "model.layers.11.mlp.up_proj", "model.layers.0.input_layernorm", "model.embed_tokens"


def group(*targets: str, bits: int = 4, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": list(targets), "weights": weights | changes}


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
}
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def pack_quantized(*groups: dict[str, Any], ignore: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": list(ignore)}
    named = {f"group_{i}": one for i, one in enumerate(groups)}
    return config | {"quantization_status": "compressed", "config_groups": named} | changes


def bits_of(config: dict[str, Any], module: str) -> int | None:
    scheme = schemes_of(config)(module)
    assert scheme is None or isinstance(scheme, Affine)
    return None if scheme is None else scheme.bits


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (pack_quantized(group("Linear")), {Q: 4, DOWN: 4, HEAD: 4}),
        (
            pack_quantized(group("Linear", "Linear"), sparsity_config={"format": "dense"}),
            {Q: 4, DOWN: 4, HEAD: 4},
        ),
        (pack_quantized(group("Linear"), ignore=("lm_head",)), {Q: 4, DOWN: 4, HEAD: None}),
        (pack_quantized(group("Linear"), ignore=("re:.*_proj",)), {Q: None, DOWN: None, HEAD: 4}),
        (pack_quantized(group("Linear"), ignore=("model.layers.1", "head")), {Q: 4, DOWN: 4, HEAD: 4}),
        (pack_quantized(group("Linear"), group("re:.*down_proj$", bits=8)), {Q: 4, DOWN: 8, HEAD: 4}),
        (pack_quantized(group("re:.*down_proj$", bits=8), group("Linear")), {Q: 4, DOWN: 8, HEAD: 4}),
        (pack_quantized(group("re:.*q_proj"), group(Q, bits=8)), {Q: 8, DOWN: None, HEAD: None}),
        (pack_quantized(group("re:.*q_proj", bits=8), group("re:.*_proj")), {Q: 4, DOWN: 4, HEAD: None}),
        (pack_quantized(group("re:q_proj", "lm_hea")), {Q: None, DOWN: None, HEAD: None}),
        (pack_quantized(group("Linear", "re:.*lm_head$")), {Q: 4, DOWN: 4, HEAD: 4}),
    ],
    ids=[
        "class",
        "class, twice",
        "ignore by name",
        "ignore by expression",
        "a name is the whole name",
        "expression before class",
        "in any order",
        "name before expression",
        "expressions alphabetically",
        "expressions match from the start",
        "head by name",
    ],
)
def test_targets_and_ignore_match_as_in_compressed_tensors(
    config: dict[str, Any], expected: dict[str, int | None]
) -> None:
    assert {module: bits_of(config, module) for module in expected} == expected


def test_matching_agrees_with_the_compressed_tensors_library() -> None:
    from compressed_tensors.utils.match import match_targets

    targets = [Q, "re:.*down_proj$", "re:.*_proj", "re:lm_head", "Linear", "lm_hea", "re:.*o_proj"]
    modules = [Q, DOWN, HEAD, "model.layers.3.self_attn.o_proj", "model.layers.3.mlp.up_proj"]
    for module in modules:
        ours = [target for target in targets if bits_of(pack_quantized(group(target)), module)]
        theirs = match_targets(module, torch.nn.Linear(1, 1), targets)
        assert set(ours) == set(theirs)
        by_size = {target: 32 * i for i, target in enumerate(targets, 1)}
        config = pack_quantized(*(group(target, group_size=size) for target, size in by_size.items()))
        assert schemes_of(config)(module) == (Affine(4, by_size[theirs[0]]) if theirs else None)


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [
        ({"group_size": 128}, Affine(4, 128)),
        ({"strategy": "channel", "group_size": None}, Affine(4)),
        ({"num_bits": 8, "symmetric": False}, Affine(8, 32, symmetric=False)),
        (
            {"actorder": "weight", "dynamic": False, "observer": "minmax", "observer_kwargs": {}},
            Affine(4, 32),
        ),
    ],
)
def test_a_groups_weights_say_the_scheme(weights: dict[str, Any], scheme: Affine) -> None:
    assert schemes_of(pack_quantized(group("Linear", **weights)))(Q) == scheme


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "None"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": ["awq"]}, "awq"),
        (pack_quantized(group("Linear"), format="marlin-24"), "marlin-24"),
        (pack_quantized(group("Linear"), quantization_status="frozen"), "frozen"),
        (pack_quantized(group("Linear"), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (pack_quantized(group("Linear"), transform_config={"config_groups": {}}), "transform_config"),
        (
            pack_quantized(group("Linear"), sparsity_config={"format": "sparse-24-bitmask"}),
            "sparse-24-bitmask",
        ),
        (pack_quantized(group("re:[")), "regular expression"),
        (pack_quantized(group("Linear", bits=3)), "num_bits = 3"),
        (pack_quantized(group("Linear", type="float")), "float"),
        (pack_quantized(group("Linear", strategy="tensor")), "tensor"),
        (pack_quantized(group("Linear", dynamic=True)), "dynamic"),
        (pack_quantized(group("Linear", actorder="dynamic")), "actorder = 'dynamic'"),
        (pack_quantized(group("Linear", group_size="32")), "group_size"),
        (pack_quantized(group("Linear", group_size=-1)), "groups of -1"),
        (pack_quantized(group("Linear") | {"input_activations": {"num_bits": 8}}), "input_activations"),
        (pack_quantized(group("Linear") | {"format": "int-quantized"}), "int-quantized"),
        (pack_quantized() | {"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
        ({"quant_method": "bitsandbytes"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "int4"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "float64"},
            "float64",
        ),
        (GPTQ | {"bits": 3}, "bits = 3"),
        (GPTQ | {"bits": 2}, "bits = 2"),
        (GPTQ | {"bits": None}, "bits = None"),
        (GPTQ | {"checkpoint_format": "gptq_p"}, "gptq_p"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (GPTQ | {"format": "bitblas"}, "bitblas"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype = 'int16'"),
        (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic"),
        (GPTQ | {"group_size": 0}, "group_size"),
        (GPTQ | {"group_size": "128"}, "group_size"),
        (GPTQ | {"group_size": True}, "group_size"),
        ({key: value for key, value in GPTQ.items() if key != "group_size"}, "group_size"),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], 3]}, "modules_in_block_to_quantize"),
        (AWQ | {"version": "gemv"}, "version = 'gemv'"),
        (AWQ | {"version": "GEMV_FAST"}, "GEMV_FAST"),
        (AWQ | {"version": "exllama"}, "exllama"),
        (AWQ | {"zero_point": False}, "zero_point = False"),
        (AWQ | {"bits": 8}, "bits = 8"),
        (AWQ | {"group_size": -2}, "group_size"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (FP8 | {"fmt": "e5m2"}, "fmt = 'e5m2'"),
        (FP8 | {"scale_fmt": "e4m3"}, "scale_fmt = 'e4m3'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size"),
        (FP8 | {"weight_block_size": [128.0, 128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": 128}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(MistralError) as caught:
        schemes_of(config)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("changes", "scheme"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Float4("nf4")),
        ({"load_in_4bit": True}, Float4("fp4")),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            Float4("nf4", nested=True),
        ),
        ({"load_in_8bit": True}, LlmInt8(6.0)),
        ({"load_in_8bit": True, "llm_int8_threshold": 4}, LlmInt8(4.0)),
    ],
)
def test_bitsandbytes_schemes_leave_the_head_and_skipped_modules_dense(
    changes: dict[str, Any], scheme: Scheme
) -> None:
    config = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": None} | changes
    of = schemes_of(config)
    assert (of(Q), of(DOWN), of(HEAD)) == (scheme, scheme, None)
    of = schemes_of(config | {"llm_int8_skip_modules": ["down_proj", "model.layers.0", "model.layers.1"]})
    assert (of(Q), of(DOWN), of("model.layers.11.mlp.up_proj"), of(HEAD)) == (None, None, scheme, scheme)


@pytest.mark.parametrize(
    ("config", "schemes"),
    [
        (GPTQ, {Q: Gptq(4, 128), HEAD: None, EMBEDDING: None, NORM: None}),
        (GPTQ | {"group_size": -1, "bits": 8, "desc_act": True}, {Q: Gptq(8, None)}),
        (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, {Q: Gptq(4, 128, 0, symmetric=False)}),
        (GPTQ | {"format": "gptq_v2", "dynamic": None, "pack_dtype": "int32"}, {Q: Gptq(4, 128, 0)}),
        (GPTQ | {"lm_head": True}, {Q: Gptq(4, 128), HEAD: Gptq(4, 128), EMBEDDING: None}),
        (
            GPTQ
            | {"modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]]},
            {Q: Gptq(4, 128), DOWN: None, UP: Gptq(4, 128), HEAD: None},
        ),
        (AWQ, {Q: Awq(128), HEAD: None}),
        (AWQ | {"version": "GEMM", "group_size": -1}, {Q: Awq(None)}),
        (AWQ | {"modules_to_not_convert": ["self_attn.q_proj"]}, {Q: None, DOWN: Awq(128), HEAD: None}),
        (AWQ | {"modules_to_not_convert": ["model.layers.1"]}, {Q: Awq(128), DOWN: Awq(128)}),
        (AWQ | {"modules_to_not_convert": [r"model.layers.(0|1)"]}, {Q: None, DOWN: Awq(128)}),
        (FP8, {Q: Fp8((128, 128)), HEAD: None}),
        (FP8 | {"modules_to_not_convert": ["model.layers.0"]}, {Q: None, DOWN: Fp8((128, 128))}),
        (FP8 | {"weight_block_size": None}, {Q: Fp8(None)}),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, {Q: Fp8((128, 128), exponents=True)}),
        (pack_quantized(group("Linear", actorder="group")), {Q: ActOrder(Affine(4, 32)), EMBEDDING: None}),
        (pack_quantized(group("Linear", actorder=True)), {Q: ActOrder(Affine(4, 32))}),
        (
            pack_quantized(group("Embedding", bits=8, strategy="channel", group_size=None), group("Linear")),
            {Q: Affine(4, 32), HEAD: Affine(4, 32), EMBEDDING: DenseAffine(Affine(8))},
        ),
    ],
)
def test_other_tools_configurations_give_every_module_its_scheme(
    config: dict[str, Any], schemes: dict[str, Any]
) -> None:
    of = schemes_of(json.loads(json.dumps(config)))
    assert {module: of(module) for module in schemes} == schemes


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_a_configuration_with_any_value_in_any_place_is_read_or_refused(data: st.DataObject) -> None:
    config: Any = data.draw(
        st.sampled_from(
            [
                pack_quantized(group("Linear", "re:.*lm_head$"), ignore=("lm_head",)),
                {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
                {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["x"]},
                GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]], "checkpoint_format": "gptq"},
                AWQ | {"modules_to_not_convert": ["self_attn.k_proj"]},
                FP8 | {"modules_to_not_convert": ["lm_head"], "scale_fmt": "float"},
            ]
        )
    )
    config = json.loads(json.dumps(config))
    place = config
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
        else:
            place[key] = data.draw(json_values)
            break
    try:
        found = [schemes_of(config)(module) for module in (Q, HEAD, EMBEDDING)]
    except MistralError as error:
        assert "\n" not in error.message
        return
    known = (Affine, ActOrder, DenseAffine, Float4, LlmInt8, Gptq, Awq, Fp8, type(None))
    assert all(isinstance(scheme, known) for scheme in found)


LAYER = {"self_attn.q_proj": 96, "self_attn.o_proj": 64, "mlp.up_proj": 96, "mlp.down_proj": 256}
"""in_features of some linears of a layer, two of which 128 does not divide."""


@pytest.mark.parametrize(
    "scheme", [Affine(4, 128), Affine(4), Affine(8), Affine(8, 64), Affine(4, 32, symmetric=False)]
)
@pytest.mark.parametrize("head_scheme", [None, Affine(8)])
def test_a_written_configuration_gives_every_layer_its_scheme_back(
    scheme: Affine, head_scheme: Affine | None
) -> None:
    schemes: dict[str, Scheme] = {
        f"model.layers.{i}.{name}": scheme.for_in_features(size)
        for i in range(12)
        for name, size in LAYER.items()
    }
    if head_scheme is not None:
        schemes[HEAD] = head_scheme
    config = quantization_config(schemes, [] if head_scheme else [HEAD], "bfloat16")
    of = schemes_of(json.loads(json.dumps(config)))
    assert {module: of(module) for module in schemes} == schemes
    assert of(HEAD) == head_scheme
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ([] if head_scheme else [HEAD])


def test_a_quantized_head_is_named_in_a_group_of_its_own() -> None:
    config = quantization_config({Q: Affine(4, 128), HEAD: Affine(8)}, [], "bfloat16")
    targets = [one["targets"] for one in config["config_groups"].values()]
    assert targets == [["re:.*q_proj$"], ["re:.*lm_head$"]]


def test_bitsandbytes_and_affine_schemes_do_not_mix() -> None:
    with pytest.raises(UsageError, match="int8 and nf4"):
        quantization_config({Q: Float4(), HEAD: Affine(8)}, [], "bfloat16")


@pytest.mark.parametrize(
    ("scheme", "directory"), [(Float4("nf4"), "bnb_nf4"), (Float4("fp4"), "bnb_fp4"), (LlmInt8(), "bnb_int8")]
)
def test_a_bitsandbytes_configuration_is_the_one_that_transformers_writes(
    scheme: Scheme, directory: str, shared_dir: Path
) -> None:
    theirs = json.loads((shared_dir / "data" / "interop" / directory / "config.json").read_text())
    assert quantization_config({Q: scheme}, [HEAD], "bfloat16") == theirs["quantization_config"]


def test_a_compressed_tensors_configuration_is_the_librarys_but_for_its_targets(shared_dir: Path) -> None:
    theirs = json.loads((shared_dir / "data" / "interop" / "ct_int4_g128_sym" / "config.json").read_text())
    ours = quantization_config({Q: Affine(4, 128)}, [HEAD], "bfloat16")
    ours["config_groups"]["group_0"]["targets"] = ["Linear"]
    assert ours == theirs["quantization_config"]
