"""docs/format.md says what builds are: its tables and examples are those of real ones."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import random_checkpoint
from safetensors.torch import load_file

from mistralcli.weights import open_checkpoint
from quant.checkpoint import COPIED_FILES, MAX_SHARD_BYTES, quantize_checkpoint
from quant.quality import Quality
from quant.scheme import Scheme, default_head_scheme
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8
from quant.staging import FORMAT_VERSION

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in DOCUMENT.split("\n## ")[1:]}
INT4 = "int4 and int8: compressed-tensors, `pack-quantized`"
NF4, INT8 = "nf4: bitsandbytes", "LLM.int8: bitsandbytes"
MODULE = "model.layers.0.self_attn.q_proj"
QUALITY = Quality("text", "0" * 64, 100, 50, 10.0, 10.1, 0.01, 0.001, 0.005, 0.04, 0.09, 0.98)
Build = Callable[[Scheme], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Makes a build of a small bfloat16 model whose layers the groups of 128 divide."""
    folder = tmp_path_factory.mktemp("document")
    random_checkpoint(
        folder / "source", dtype="bfloat16", hidden_size=128, intermediate_size=256, head_dim=32
    )

    def make(scheme: Scheme) -> Path:
        source, destination = folder / "source", folder / scheme.name
        if not destination.exists():
            head = default_head_scheme(scheme)
            quantize_checkpoint(
                open_checkpoint(source),
                source,
                destination,
                scheme,
                head_scheme=head,
                check=lambda _: QUALITY,
            )
        return destination

    return make


def rows(section: str) -> dict[str, str]:
    """The first two columns of a section's tables."""
    return dict(re.findall(r"^\| `(.+?)` \| (.+?) \|", SECTIONS[section], re.MULTILINE))


def example(section: str) -> dict[str, Any]:
    (text,) = re.findall(r"```json\n(.*?)```", SECTIONS[section], re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize(
    ("section", "scheme"), [(INT4, Affine(4, 128)), (NF4, Float4()), (INT8, LlmInt8())], ids=str
)
def test_each_configuration_is_that_of_a_build(section: str, scheme: Scheme, build: Build) -> None:
    config = json.loads((build(scheme) / "config.json").read_text())
    assert config["quantization_config"] == example(section)


def test_asymmetric_builds_differ_as_the_page_says(build: Build) -> None:
    expected = example(INT4)
    del expected["config_groups"]["group_1"]
    expected["config_groups"]["group_0"]["weights"] |= {"group_size": 32, "symmetric": False}
    expected["ignore"] = ["lm_head"]
    config = json.loads((build(Affine(4, 32, symmetric=False)) / "config.json").read_text())
    assert config["quantization_config"] == expected


def test_an_int8_head_shares_the_group_of_int8_layers(build: Build) -> None:
    config = json.loads((build(Affine(8)) / "config.json").read_text())["quantization_config"]
    (only,) = config["config_groups"].values()
    (expression,) = only["targets"]
    assert re.match(expression.removeprefix("re:"), "lm_head") and config["ignore"] == []


@pytest.mark.parametrize(
    ("section", "scheme"),
    [(INT4, Affine(4, 32, symmetric=False)), (NF4, Float4()), (INT8, LlmInt8())],
    ids=str,
)
def test_each_table_has_the_tensors_of_a_layer_and_their_dtypes(
    section: str, scheme: Scheme, build: Build
) -> None:
    found = {
        name.removeprefix(f"{MODULE}."): str(tensor.dtype).removeprefix("torch.")
        for name, tensor in load_file(build(scheme) / "model.safetensors").items()
        if name.startswith(f"{MODULE}.")
    }
    stated = {name: dtype.replace("the model's", "bfloat16") for name, dtype in rows(section).items()}
    assert stated == found


def fields(card: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The full name of each value, with FILE and NAME where keys are a model's own."""
    own = {"source.files.": "FILE", "files.": "FILE", "tensors.": "NAME"}
    for key, value in card.items():
        name = prefix + own.get(prefix, key)
        if isinstance(value, dict):
            yield from fields(value, f"{name}.")
        else:
            yield name


def test_the_card_has_the_fields_of_the_table(build: Build) -> None:
    card = json.loads((build(Affine(4, 128)) / "quantization_card.json").read_text())
    assert list(dict.fromkeys(fields(card))) == list(rows("`quantization_card.json`"))
    assert f"format version {card['format_version']}." in DOCUMENT
    assert rows("`quantization_card.json`")["format_version"].endswith(f": {FORMAT_VERSION}")


def test_files_are_copied_and_cut_as_the_page_says() -> None:
    (listed,) = re.findall(r"Copied unchanged(.*?)Nothing else", SECTIONS["Files"], re.DOTALL)
    assert tuple(re.findall(r"`(.+?)`", listed)) == COPIED_FILES
    assert f"at most {MAX_SHARD_BYTES:,} bytes" in SECTIONS["Files"]
