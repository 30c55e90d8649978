"""Some linears with more bits than others: by name or by what they lose, and any reader finds them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import all_logits, load, random_checkpoint, token_ids
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file
from test_quant_checkpoint import build, card
from test_quant_interop import layers, logits_of
from transformers import AutoModelForCausalLM

from mistralcli.cli.quantize_report import Planned, plan_text
from mistralcli.weights import open_checkpoint
from quant.build_plan import BuildPlan, Recipe, open_model, plan_build
from quant.checkpoint import decided_plan
from quant.errors import UsageError
from quant.keep import exceptions, fused_sets, parse_rule
from quant.memory import peak_without_data
from quant.scheme import default_head_scheme, schemes_of
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4

INT4 = Affine(4, 64)
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
LAYERS = [f"model.layers.{i}" for i in range(3)]
ATTENTION = [f"self_attn.{kind}_proj" for kind in "qkvo"]
LINEARS = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MODULES = ["lm_head", *(f"{layer}.{linear}" for layer in LAYERS for linear in LINEARS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixed") / "source"
    random_checkpoint(directory, dtype="float32", **SHAPE)
    return directory


def stored(directory: Path) -> dict[str, str]:
    """The scheme of each quantized module by the card, checked against how any reader finds it."""
    schemes = {name.removesuffix(".weight"): e["scheme"] for name, e in card(directory)["tensors"].items()}
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme_of = schemes_of(config)
    found = {module: scheme_of(module) for module in MODULES}
    assert {module: scheme.name for module, scheme in found.items() if scheme is not None} == schemes
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    for module in MODULES:
        # In whatever order a reader tries them, and whether or not it looks into `ignore`.
        n_matching = sum(bool(re.match(target.removeprefix("re:"), module)) for target in targets)
        assert n_matching == (module in schemes), module
        assert (module in config["ignore"]) == (module not in schemes)
    return schemes


def keep(*rules: str) -> dict[str, Any]:
    return {"keep": [parse_rule(rule) for rule in rules]}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["*.1.mlp.down_proj=8"], {"model.layers.1.mlp.down_proj": "int8"}),
        (["re:.*(0|2).*self_attn.[qkv]_proj=8", "*.o_proj=dense"], None),
        (["lm_head=dense"], {"lm_head": None}),
        (["lm_head.weight=4"], {"lm_head": "int4-g64"}),
        (["*layers.2.*=dense", "model.layers.2.mlp.down_proj=8"], None),
    ],
)
def test_linears_that_are_named_keep_more_bits(
    rules: list[str], expected: dict[str, str | None] | None, source: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "build", INT4, **keep(*rules))
    default = dict.fromkeys(MODULES, "int4-g64") | {"lm_head": "int8"}
    if expected is None and "*.o_proj=dense" in rules:
        expected = {f"{layer}.self_attn.o_proj": None for layer in LAYERS}
        expected |= {f"{LAYERS[i]}.self_attn.{kind}_proj": "int8" for i in (0, 2) for kind in "qkv"}
    elif expected is None:
        expected = {f"{LAYERS[2]}.{linear}": None for linear in LINEARS}
        expected[f"{LAYERS[2]}.mlp.down_proj"] = "int8"
    wanted = {module: name for module, name in (default | expected).items() if name is not None}
    assert stored(tmp_path / "build") == wanted
    assert card(tmp_path / "build")["keep"] == rules
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "build" / "model.safetensors"),
    )
    for module in set(MODULES) - wanted.keys():
        assert torch.equal(before[f"{module}.weight"], after[f"{module}.weight"])


@pytest.mark.parametrize(
    "rules", [["*.1.mlp.down_proj=8", "re:.*layers.0.*self_attn.[qkv]_proj=8"], ["*.1.*=dense", "lm_head=4"]]
)
def test_transformers_reads_a_mixed_build_with_the_same_weights_and_logits(
    rules: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")
    directory = tmp_path / "build"
    build(source, directory, INT4, **keep(*rules))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids = token_ids(24)
    logits = logits_of(theirs, torch.tensor(ids))
    for layer, module, linear in layers(directory, theirs):
        assert torch.equal(linear.dense_rows(0, linear.out_features), module.weight), layer
    ours = all_logits(load(directory), ids, chunk=24, slack=24)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rules", "scheme", "message"),
    [
        (["*q_proj=8"], INT4, "different bits to model.layers.0.self_attn.q_proj, "),
        (["*gate_proj=dense"], INT4, "different bits to model.layers.0.mlp.gate_proj, "),
        (["*embed_tokens=8"], INT4, "fits no linear"),
        (["*=8"], Affine(4, 64, symmetric=False), "--asymmetric"),
        (["*=8"], Float4(), "nf4"),
    ],
)
def test_rules_that_no_engine_could_follow_are_refused(rules: list[str], scheme: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        exceptions([parse_rule(rule) for rule in rules], MODULES, scheme)
    assert message in caught.value.message


@pytest.mark.parametrize("text", ["x", "=8", "x=3", "x=", "re:(=8"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--keep"):
        parse_rule(text)


def test_the_last_rule_for_a_module_counts() -> None:
    rules = [parse_rule("*=8"), parse_rule("*.mlp.*=4"), parse_rule("lm_head=dense")]
    chosen = exceptions(rules, MODULES, INT4)
    assert chosen["lm_head"] is None and chosen["model.layers.0.mlp.up_proj"] == INT4
    assert chosen["model.layers.0.self_attn.o_proj"] == Affine(8)


def test_fused_sets_cover_each_linear_once() -> None:
    sets = list(fused_sets(MODULES))
    assert sorted(module for members in sets for module in members) == sorted(set(MODULES) - {"lm_head"})
    assert sorted(map(len, sets)) == sorted([3, 1, 2, 1] * 3)


def planned(source: Path, target_bytes: int | None, **options: Any) -> BuildPlan:
    recipe = Recipe(INT4, default_head_scheme(INT4), target_bytes=target_bytes, **options)
    return decided_plan(open_model(open_checkpoint(source), source), recipe, None, torch.device("cpu"))


def test_a_plan_has_the_exact_size_of_every_file_but_the_card(source: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for file in source.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "source" / "tokenizer.json").write_text("the tokenizer")
    for i, options in enumerate(({}, {"target_bytes": 420_000}, {"max_shard_bytes": 100_000})):
        build(tmp_path / "source", tmp_path / f"build{i}", INT4, **options)
        plan = planned(
            tmp_path / "source",
            options.get("target_bytes"),
            **{key: value for key, value in options.items() if key == "max_shard_bytes"},
        )
        sizes = {file.name: file.stat().st_size for file in (tmp_path / f"build{i}").iterdir()}
        assert sizes.pop("quantization_card.json") <= plan.card_bytes
        assert plan.files == sizes
        assert plan.size_bytes == sum(sizes.values())


def test_a_target_size_is_used_as_far_as_a_set_of_linears_allows(source: Path, tmp_path: Path) -> None:
    smallest = planned(source, None)
    room = 40_000
    target = smallest.size_bytes + smallest.card_bytes + room
    build(source, tmp_path / "build", INT4, target_bytes=target)
    size = sum(file.stat().st_size for file in (tmp_path / "build").iterdir())
    assert target - 25_000 < size <= target
    schemes = stored(tmp_path / "build")
    assert (
        set(schemes.values()) == {"int4-g64", "int8"}
        and card(tmp_path / "build")["target_size_bytes"] == target
    )
    for members in fused_sets(MODULES):
        assert len({schemes[module] for module in members}) == 1


def test_bits_go_where_a_byte_gains_most(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    for linear in ("mlp.down_proj", "self_attn.o_proj"):
        weights[f"model.layers.1.{linear}.weight"] *= 5
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(weights, tmp_path / "source" / "model.safetensors")
    smallest = planned(tmp_path / "source", None)
    plan = planned(tmp_path / "source", smallest.size_bytes + smallest.card_bytes + 25_000)
    larger = {t.module for t in plan.tensors if t.scheme == Affine(8)} - {"lm_head"}
    assert larger == {"model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"}


def test_a_target_that_cannot_be_is_refused_with_what_can(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(INT4, default_head_scheme(INT4))
    model = open_model(open_checkpoint(source), source)
    smallest, largest = plan_build(model, recipe), plan_build(model, recipe, MODULES[1:])
    with pytest.raises(UsageError) as caught:
        build(source, tmp_path / "build", INT4, target_bytes=smallest.size_bytes)
    for plan in (smallest, largest):
        assert f"{plan.size_bytes + plan.card_bytes:,}" in caught.value.message
    assert not (tmp_path / "build.partial").exists()
    enough = largest.size_bytes + largest.card_bytes
    assert planned(source, enough).files == largest.files == planned(source, 10 * enough).files


def test_a_dry_run_says_what_the_build_then_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    flags = ["--keep", "*.1.*=8", "--max-ram", "2GB", "--no-check"]
    dry = mistral("quantize", tiny_model_dir, *flags, "--dry-run", "--json", home=tmp_path)
    assert dry.returncode == 0 and not (tmp_path / "data").exists()
    plan = json.loads(dry.stdout)
    made = mistral("quantize", tiny_model_dir, *flags, home=tmp_path)
    assert made.returncode == 0, made.stderr
    sizes = {file.name: file.stat().st_size for file in Path(plan["directory"]).iterdir()}
    assert sizes.pop("quantization_card.json") <= plan["card_bytes"]
    assert plan["files"] == sizes and plan["size_bytes"] == sum(sizes.values())
    assert plan["name"] == "tiny-int4" and plan["stored"]["int8"]["n_tensors"] == 7 + 1


def test_more_memory_than_allowed_is_refused_with_what_would_fit(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    done = mistral("quantize", tiny_model_dir, "--max-ram", "100MB", home=tmp_path)
    assert_one_sentence(done, 7, "--max-ram", "the least is")
    assert not (tmp_path / "data").exists()


def test_a_plan_can_be_read(source: Path) -> None:
    plan = planned(source, None)
    text = plan_text(Planned("mine", source, "rtn", plan, peak_without_data(plan.tensors, 2), 10**12))
    assert f"size: {plan.size_bytes:,} bytes" in text and "1.00 TB are free" in text
    assert "int4-g64   21 tensors" in text and "model.safetensors" in text and "peak memory: 4" in text


def test_the_peak_without_data_is_that_of_the_largest_tensor(source: Path) -> None:
    plan = planned(source, None)
    largest = max(plan.tensors, key=lambda tensor: tensor.spec.nbytes)
    peak = peak_without_data(plan.tensors, n_threads=2)
    assert largest.spec.nbytes <= peak.tensors <= 2 * largest.spec.nbytes
    assert peak.total == peak.process + peak.tensors
