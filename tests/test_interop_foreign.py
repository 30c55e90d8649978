"""GPTQ, AWQ, FP8 and other tools' rarer files have the weights that their formats say, or are refused by name."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Store, Tensors, awq, foreign_checkpoint, fp8, gptq, pack_quantized_with_g_idx
from models import all_logits, load, tiny_instruct_checkpoint, token_ids
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file
from test_quant_formats import group, pack_quantized
from test_weights import MISTRAL_NAMES, interleaved

from mistralcli import weights
from mistralcli.checkpoint_files import hugging_face_name
from mistralcli.decoder import can_decode
from mistralcli.errors import MistralError
from mistralcli.layerwise import LayerwiseModel
from mistralcli.model import Transformer
from mistralcli.weights import load_model, loaded_sizes, open_checkpoint
from quant.linear import QuantizedLinear
from quant.schemes.affine import AffineLinear

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16], "modules_to_not_convert": ["lm_head"]}
FP8_TENSOR = FP8 | {"weight_block_size": None, "activation_scheme": "static"}
G_IDX = pack_quantized(group("Linear", group_size=16, actorder="group"), ignore=("lm_head",))

CASES: dict[str, tuple[dict[str, Any], Store, dict[str, Any]]] = {
    "gptq": (GPTQ, gptq(), {}),
    "gptq, int8": (GPTQ | {"bits": 8}, gptq(8), {}),
    "gptq, int8, zero points": (GPTQ | {"bits": 8, "sym": False}, gptq(8, sym=False), {}),
    "gptq, zero points": (GPTQ | {"sym": False}, gptq(sym=False), {}),
    "gptq, act-order": (GPTQ | {"desc_act": True}, gptq(act_order=True), {}),
    "gptq, act-order, zero points, version 2": (
        GPTQ | {"desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"},
        gptq(sym=False, v2=True, act_order=True),
        {},
    ),
    "gptq, act-order, int8": (GPTQ | {"desc_act": True, "bits": 8}, gptq(8, act_order=True), {}),
    "gptq, whole rows": (GPTQ | {"group_size": -1, "desc_act": True}, gptq(group=-1), {}),
    "gptq, a last short group": (GPTQ | {"group_size": 32}, gptq(group=32, sym=False), {}),
    "gptq, a last short group in act-order": (
        GPTQ | {"group_size": 32, "desc_act": True},
        gptq(group=32, act_order=True),
        {},
    ),
    "gptq, head": (GPTQ | {"lm_head": True}, gptq(), {"head": True}),
    "awq": (AWQ, awq(), {}),
    "awq, whole rows": (AWQ | {"group_size": -1, "version": "GEMM"}, awq(-1), {}),
    "fp8": (FP8, fp8((32, 16)), {}),
    "fp8, blocks that do not divide": (FP8 | {"weight_block_size": [40, 56]}, fp8((40, 56)), {}),
    "fp8, blocks of 128": ({"quant_method": "fp8"}, fp8((128, 128)), {}),
    "fp8, one scale": (FP8_TENSOR, fp8(None), {}),
    "fp8, one scale by Mistral's name": (FP8_TENSOR, fp8(None, suffix="qscale_weight"), {}),
    "fp8, exponents": (FP8 | {"scale_fmt": "ue8m0"}, fp8((32, 16), exponents=torch.uint8), {}),
    "fp8, exponents by type": (
        FP8 | {"scale_fmt": "ue8m0"},
        fp8((32, 16), exponents=torch.float8_e8m0fnu),
        {},
    ),
    "pack-quantized, act-order": (G_IDX, pack_quantized_with_g_idx(), {}),
}


@pytest.fixture(autouse=True)
def _activations_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels round them; what is compared here is what a file means."""
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")


def made(case: str, directory: Path, **changes: Any) -> Path:
    quantization, store, options = CASES[case]
    return foreign_checkpoint(directory, quantization, store, **options | changes)


def dense_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """All linears' weights, whatever they are stored in, by the names of modules in a checkpoint."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[hugging_face_name(name)] = module.dense_rows(0, module.out_features)
        elif name.startswith(("layers.", "output")) and hasattr(module, "weight"):
            found[hugging_face_name(name)] = module.weight.data
    return found


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exactly_those_of_the_format_and_so_are_logits(case: str, tmp_path: Path) -> None:
    stored = made(case, tmp_path)
    ours, meant = load(stored), load(tmp_path / "dense")
    expected = dense_weights(meant)
    for name, weight in dense_weights(ours).items():
        assert torch.equal(weight, expected[name]), name
    ids = token_ids(17)
    logits = all_logits(meant, ids, chunk=17, slack=17)
    torch.testing.assert_close(all_logits(ours, ids, chunk=17, slack=17), logits, atol=1e-4, rtol=0)
    n_affine = sum(isinstance(module, AffineLinear) for module in ours.modules())
    assert n_affine == (0 if case.startswith("fp8") else 22 if "head" in case else 21)


@pytest.mark.parametrize(
    "case", ["gptq", "gptq, act-order", "gptq, int8, zero points", "awq", "pack-quantized, act-order"]
)
def test_the_kernels_of_the_cpu_multiply_with_the_same_weights(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_tool = {"awq": awq(32), "pack-quantized, act-order": pack_quantized_with_g_idx(32)}
    by_gptq = gptq(8 if "int8" in case else 4, 32, sym="zero" not in case, act_order="act-order" in case)
    stated = json.dumps(CASES[case][0]).replace(
        '"group_size": 16', '"group_size": 32'
    )  # what the kernels know
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    stored = foreign_checkpoint(tmp_path, json.loads(stated), by_tool.get(case, by_gptq), **sizes)
    reference = load(stored)
    monkeypatch.delenv("MISTRAL_CLI_KERNELS")
    prepared = load(stored)
    affine = [module for module in prepared.modules() if isinstance(module, AffineLinear)]
    assert affine and all(module.interleaved is not None for module in affine)
    for name, weight in dense_weights(reference).items():
        assert torch.equal(weight, dense_weights(prepared)[name])
    ids = token_ids(9)
    logits = all_logits(reference, ids, chunk=9, slack=9)
    tolerance = 0.05 * float(logits.abs().max())  # activations of 8 bits
    torch.testing.assert_close(all_logits(prepared, ids, chunk=9, slack=9), logits, atol=tolerance, rtol=0)


def test_a_decoder_takes_no_model_whose_columns_are_in_another_order(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2}
    for act_order in (False, True):
        config = GPTQ | {"group_size": 32, "desc_act": act_order}
        directory = tmp_path / str(act_order)
        model = load(foreign_checkpoint(directory, config, gptq(4, 32, act_order=act_order), **sizes))
        assert can_decode(model, 1) is not act_order


@pytest.mark.parametrize(
    "name", ["gptq_v1_int4_g128_sym", "gptq_v1_int8_g128_sym", "gptq_v2_int4_g64_asym", "awq_gemm_int4_g128"]
)
def test_other_tools_dense_weights_are_ours_bit_by_bit(name: str, shared_dir: Path) -> None:
    interop = shared_dir / "data" / "interop"
    expected = json.loads((interop / f"{name}.golden.json").read_text())["dense_weight_sha256_f32le_out_in"]
    golden = load_file(interop / f"{name}.golden.safetensors")
    first_layer = load_file(interop / f"{name}.dequant_layer0_f16.safetensors")
    model = load(interop / name)
    found = dense_weights(model)
    assert {
        module: hashlib.sha256(found[module].contiguous().numpy().tobytes()).hexdigest()
        for module in expected
    } == expected
    for tensor, weight in first_layer.items():
        assert torch.equal(found[tensor.removesuffix(".weight")].half(), weight)
    logits = all_logits(model, golden["input_ids"].tolist(), chunk=16, slack=16)
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)


def test_an_fp8_checkpoint_is_dense_in_its_models_type(shared_dir: Path) -> None:
    interop = shared_dir / "data" / "interop"
    golden = load_file(interop / "fp8_block128.golden.safetensors")
    first_layer = load_file(interop / "fp8_block128.dequant_layer0_f16.safetensors")
    model = load(interop / "fp8_block128")
    found = dense_weights(model)
    for tensor, weight in first_layer.items():
        ours = found[tensor.removesuffix(".weight")]
        assert torch.equal(ours, ours.bfloat16().float())
        # One was rounded to bfloat16, the other to float16: by at most 2⁻⁸ and 2⁻¹¹ of the value.
        torch.testing.assert_close(ours, weight.float(), atol=2e-7, rtol=2.0**-8 + 2.0**-11)
    logits = all_logits(model, golden["input_ids"].tolist(), chunk=16, slack=16)
    torch.testing.assert_close(logits, golden["logits"], atol=0.15, rtol=0)  # computed in bfloat16


def test_a_quantized_embedding_is_dense_once_it_is_read(shared_dir: Path) -> None:
    directory = shared_dir / "data" / "interop" / "ct_int4_g128_lmhead_embed8"
    golden = load_file(directory.with_name(f"{directory.name}.golden.safetensors"))
    tensors = load_file(directory / "model.safetensors")
    model = load(directory)
    codes = tensors["model.embed_tokens.weight_packed"].view(torch.uint8).float() - 128
    dense = codes * tensors["model.embed_tokens.weight_scale"].float()
    assert torch.equal(model.tok_embeddings.weight, dense.bfloat16())
    logits = all_logits(model, golden["input_ids"].tolist(), chunk=16, slack=16)
    torch.testing.assert_close(logits, golden["logits"], atol=0.15, rtol=0)  # computed in bfloat16


def test_fp8_in_mistrals_own_layout(tmp_path: Path) -> None:
    stored = foreign_checkpoint(tmp_path, FP8_TENSOR, fp8(None, suffix="qscale_weight"))
    config = json.loads((stored / "config.json").read_text())
    own = {}
    for name, tensor in load_file(stored / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        heads = {"q_proj": 4, "k_proj": 2}.get(module.split(".")[-1]) if suffix == "weight" else None
        own[f"{MISTRAL_NAMES[module]}.{suffix}"] = interleaved(tensor, heads) if heads else tensor
    (tmp_path / "own").mkdir()
    save_file(own, tmp_path / "own" / "consolidated.safetensors")
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
    }
    names |= {
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "hidden_dim": "intermediate_size",
    }
    params = {ours: config[theirs] for ours, theirs in names.items()} | {"norm_eps": 1e-5, "rope_theta": 1e4}
    quantization = {"qformat_weight": "fp8_e4m3", "qscale_act": "TENSOR"}
    (tmp_path / "own" / "params.json").write_text(json.dumps(params | {"quantization": quantization}))
    found, expected = dense_weights(load(tmp_path / "own")), dense_weights(load(stored))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    (tmp_path / "own" / "params.json").write_text(
        json.dumps(params | {"quantization": {"qformat_weight": "fp4"}})
    )
    with pytest.raises(MistralError, match="fp4"):
        open_checkpoint(tmp_path / "own")


def test_an_old_repository_states_gptq_in_a_file_of_its_own(tmp_path: Path) -> None:
    stored = foreign_checkpoint(tmp_path, None, gptq(act_order=True))
    config = {key: value for key, value in GPTQ.items() if key != "quant_method"} | {"desc_act": True}
    (stored / "quantize_config.json").write_text(
        json.dumps(config | {"damp_percent": 0.01, "static_groups": False})
    )
    expected = dense_weights(load(tmp_path / "dense"))
    for name, weight in dense_weights(load(stored)).items():
        assert torch.equal(weight, expected[name]), name


def zero_biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    stored = made("gptq", tmp_path, damage=zero_biases)
    expected = dense_weights(load(tmp_path / "dense"))
    for name, weight in dense_weights(load(stored)).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("case", ["gptq, act-order, zero points, version 2", "fp8, one scale"])
def test_a_model_runs_layer_by_layer_too(case: str, tmp_path: Path) -> None:
    stored = made(case, tmp_path)
    ids = token_ids(11)
    model = LayerwiseModel(stored)
    hidden = model.embed(torch.tensor([ids]))
    for index in range(model.config.n_layers):
        hidden = model.run_layer(model.layer(index), hidden)
    expected = all_logits(load(stored), ids, chunk=11, slack=11)
    torch.testing.assert_close(model.logits(hidden)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["gptq, act-order", "awq", "fp8", "fp8, one scale by Mistral's name"])
def test_reading_ahead_as_for_a_gpu_gives_the_same_weights(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = made(case, tmp_path)
    expected = dense_weights(load(stored))
    monkeypatch.setattr(weights, "_mapping", weights._staging)
    for name, weight in dense_weights(load(stored)).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("case", [case for case in CASES if "short" not in case])
def test_the_size_that_is_planned_is_the_size_that_is_loaded(case: str, tmp_path: Path) -> None:
    stored = made(case, tmp_path, dtype="bfloat16")
    model = load_model(stored, device=torch.device("cpu"), dtype=torch.float32)
    loaded = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    planned = loaded_sizes(stored, torch.float32, "cpu").total
    # Only what is in the files says whether zero points and an order of columns are needed: they are counted.
    unknown = 0.0 if case.startswith(("fp8", "awq")) else 0.3  # of very small layers, that is
    assert loaded <= planned <= loaded * (1 + unknown)


def without(suffix: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[f"model.layers.1.mlp.up_proj.{suffix}"]

    return damage


def with_changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        name = f"model.layers.1.mlp.up_proj.{suffix}"
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def with_set(suffix: str, index: int, value: int) -> Callable[[Tensors], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return with_changed(suffix, change)


def one_bias(tensors: Tensors) -> None:
    zero_biases(tensors)
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1


@pytest.mark.parametrize(
    ("case", "damage", "named"),
    [
        ("gptq", without("qzeros"), r"up_proj\.qzeros is missing"),
        ("gptq", without("g_idx"), r"up_proj\.g_idx is missing"),
        ("gptq", with_changed("qweight", lambda t: t[:-1]), r"up_proj\.qweight .* shape \[5, 80\]"),
        ("gptq", with_changed("qweight", lambda t: t.long()), r"up_proj .*qweight is stored as torch\.int64"),
        ("gptq", with_changed("scales", lambda t: t.int()), r"up_proj .*scales are stored as torch\.int32"),
        ("gptq", with_changed("g_idx", lambda t: t.float()), r"up_proj .*g_idx is stored as torch\.float32"),
        ("gptq", with_set("g_idx", 4, -1), r"up_proj .*group -1 of 3"),
        ("gptq, act-order", with_set("g_idx", 4, 3), r"up_proj .*group 3 of 3"),
        ("gptq, act-order", with_set("g_idx", 4, 1 << 30), r"up_proj .*group 1073741824 of 3"),
        ("gptq", with_set("g_idx", 4, 2), r"up_proj .*groups of 16 columns"),
        ("gptq", one_bias, r"up_proj\.bias .*bias"),
        ("awq", with_changed("scales", lambda t: t[:, 1:]), r"up_proj\.scales .* shape \[3, 79\]"),
        ("awq", with_changed("qzeros", lambda t: t.short()), r"up_proj .*qzeros is stored as torch\.int16"),
        ("fp8", without("weight_scale_inv"), r"up_proj\.weight_scale_inv is missing"),
        ("fp8", without("weight"), r"up_proj\.weight is missing"),
        (
            "fp8",
            with_changed("weight_scale_inv", lambda t: t[1:]),
            r"up_proj .*shape \[2, 3\] where \[3, 3\]",
        ),
        ("fp8", with_changed("weight_scale_inv", lambda t: t.long()), r"up_proj .*torch\.int64"),
        ("fp8", with_changed("weight", lambda t: t.to(torch.float8_e5m2)), r"up_proj .*float8_e5m2"),
        ("fp8", with_changed("weight", lambda t: t[1:]), r"up_proj\.weight .*shape \[79, 48\]"),
        ("fp8, exponents", with_set("weight_scale_inv", 0, 255), r"up_proj.* not a number"),
        ("fp8, one scale", with_changed("weight_scale_inv", lambda t: t.expand(3)), r"up_proj .*shape \[3\]"),
        ("pack-quantized, act-order", with_set("weight_g_idx", 0, -5), r"up_proj .*group -5 of 3"),
        ("pack-quantized, act-order", without("weight_g_idx"), r"up_proj\.weight_g_idx is missing"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    case: str, damage: Callable[[Tensors], None], named: str, tmp_path: Path
) -> None:
    stored = made(case, tmp_path, damage=damage)
    with pytest.raises(MistralError, match=named) as caught:
        load(stored)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("quantization", "named"),
    [(GPTQ | {"group_size": 3}, "groups of 3 weights of 4 bits"), (AWQ | {"group_size": 32}, "groups of 32")],
)
def test_groups_that_fit_no_layer_are_refused(
    quantization: dict[str, Any], named: str, tmp_path: Path
) -> None:
    store = gptq() if quantization["quant_method"] == "gptq" else awq()
    with pytest.raises(MistralError, match=named):
        load(foreign_checkpoint(tmp_path, quantization, store))


def test_a_foreign_model_is_run_and_shown_but_not_quantized_again(tmp_path: Path) -> None:
    tiny_instruct_checkpoint(tmp_path / "tiny")
    shape = json.loads((tmp_path / "tiny" / "config.json").read_text())
    names = ("vocab_size", "sliding_window", "max_position_embeddings")
    stored = foreign_checkpoint(
        tmp_path,
        GPTQ | {"desc_act": True},
        gptq(act_order=True),
        dtype="bfloat16",
        **{name: shape[name] for name in names},
    )
    (tmp_path / "tiny" / "tokenizer.model").rename(stored / "tokenizer.model")
    done = mistral("run", "-m", stored, "-n", "3", "-t", "0", "hello", home=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    shown = json.loads(mistral("show", stored, "--json", home=tmp_path).stdout)
    assert shown["memory"]["weights_bytes"] == loaded_sizes(stored, torch.float32, "cpu").total
    again = mistral("quantize", stored, "-o", tmp_path / "again", home=tmp_path)
    assert_one_sentence(again, 2, "quantized already")
