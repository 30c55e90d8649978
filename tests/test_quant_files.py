"""Which files are a checkpoint's: one rule for those that pull, list, load, quantize and tokenize."""

import json
from pathlib import Path

import pytest

from mistralcli.hub_files import RemoteFile, choose_files
from mistralcli.tokenizer import _mistral_file
from quant.checkpoint import COPIED_FILES
from quant.errors import IntegrityError
from quant.files import TOKENIZER_FILES, matches, numbered_shards, weight_files

TOKENIZERS = [
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v7m1",
    "mistral_instruct_tokenizer_240323.model.v3",
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_read_is_also_pulled_and_copied_into_builds(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert _mistral_file(tmp_path) == tmp_path / name
    assert matches(name, COPIED_FILES)
    listing = [RemoteFile(file, 10, "0" * 40) for file in ("config.json", "model.safetensors", name)]
    assert name in {file.name for file in choose_files("a/b", listing)}


@pytest.mark.parametrize(
    "name", ["tokenizer.model.exe", "a/tokenizer.model", "model.v3", "x.model", "config.json"]
)
def test_another_file_is_no_tokenizer_file(name: str) -> None:
    assert not matches(name, TOKENIZER_FILES)


def test_one_shard_tells_all_their_names() -> None:
    expected = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert numbered_shards("model", [expected[1], "model-1-of-x.safetensors"]) == expected
    assert numbered_shards("consolidated", expected) == []


def test_a_single_file_comes_before_an_index_before_numbers(tmp_path: Path) -> None:
    assert weight_files(tmp_path, "model") == []
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert weight_files(tmp_path, "model") == [
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}})
    )
    assert weight_files(tmp_path, "model") == ["a.safetensors", "b.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path, "model") == ["model.safetensors"]


@pytest.mark.parametrize("shard", ["../x", "/x", "a/b"])
def test_an_index_cannot_name_what_is_no_file_of_the_directory(shard: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(IntegrityError, match=r"index\.json"):
        weight_files(tmp_path, "model")
