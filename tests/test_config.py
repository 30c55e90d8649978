"""Configurations: what they leave out, what they may not say, and what ends a completion."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, random_checkpoint
from safetensors.torch import load_file, save_file
from test_weights import as_mistral_layout

from mistralcli.config import ModelConfig, hugging_face_config, read_config
from mistralcli.errors import IntegrityError, MistralError


def read(directory: Path, **changes: Any) -> ModelConfig:
    """The configuration of `SMALL` with changes, from a config.json."""
    (directory / "config.json").write_text(json.dumps({"model_type": "mistral"} | SMALL | changes))
    return read_config(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": -1},
        {"rope_theta": float("inf")},
        {"rope_theta": 10**400},
        {"rms_norm_eps": -1e-5},
        {"rms_norm_eps": float("nan")},
        {"max_position_embeddings": -5},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 1},
        {"num_attention_heads": 0, "head_dim": None},
        {"hidden_size": float("inf")},
        {"hidden_size": 10**30},
        {"hidden_size": "48"},
        {"sliding_window": float("inf")},
        {"sliding_window": 0},
        {"layer_types": 5},
        {"layer_types": {}},
        {"layer_types": ["full_attention"]},
        {"model_type": []},
        {"model_type": {}},
        {"model_type": None},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": -1},
        {"eos_token_id": [2, -1]},
        {"eos_token_id": float("inf")},
        {"eos_token_id": "</s>"},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": -1},
        {"rope_scaling": "yarn"},
        {"rope_parameters": ["x"]},
        {"quantization_config": ["x"]},
        {"quantization_config": "int4"},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_an_integrity_error(changes: dict[str, Any], tmp_path: Path) -> None:
    read(tmp_path)
    with pytest.raises(IntegrityError):
        read(tmp_path, **changes)


@pytest.mark.parametrize("text", ["{}", '{"model_type": []}', '{"model_type": {}}'])
def test_a_model_without_a_type_is_told_so_in_our_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(IntegrityError, match="model_type") as caught:
        read_config(tmp_path)
    assert "unhashable" not in caught.value.message


def test_a_base_that_is_not_finite_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="rope_theta = inf; it must be above 0 and finite"):
        read(tmp_path, rope_theta=float("inf"))


def test_layers_of_an_unknown_type_are_refused_and_known_ones_are_not(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert read(tmp_path, layer_types=kinds, sliding_window=8).sliding_windows == (None, 8, None)
    assert read(tmp_path, layer_types=None, sliding_window=8).sliding_windows == (8, 8, 8)
    with pytest.raises(MistralError, match="layers of type 'a' are not supported"):
        read(tmp_path, layer_types=["a", *kinds[1:]])


def test_scaled_rotary_embeddings_are_refused_wherever_they_are_stated(tmp_path: Path) -> None:
    default, yarn = {"rope_type": "default"}, {"rope_type": "yarn"}
    read(tmp_path, rope_scaling=default, rope_parameters=default)
    for scaling, parameters in ((default, yarn), (yarn, default), (None, yarn)):
        with pytest.raises(MistralError, match="yarn"):
            read(tmp_path, rope_scaling=scaling, rope_parameters=parameters)


def test_a_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads=None).n_kv_heads == SMALL["num_attention_heads"]
    assert read(tmp_path, head_dim=None).head_dim == 12
    assert read(tmp_path, rope_scaling=None, rope_theta=None).rope_theta == 1e4
    assert read(tmp_path, rope_theta=5e5, rope_parameters={"rope_theta": 1e6}).rope_theta == 1e6


def test_a_completion_ends_with_all_ids_that_the_configuration_and_its_neighbour_state(
    tmp_path: Path,
) -> None:
    assert read(tmp_path, eos_token_id=None).eos_ids == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 7]}')
    assert read(tmp_path, eos_token_id=7).eos_ids == (8, 7)
    assert read(tmp_path, eos_token_id=[2]).eos_ids == (8, 7, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(
        IntegrityError, match=r"generation_config\.json has an eos_token_id that is no token id"
    ):
        read(tmp_path)


def test_layers_with_different_windows_cannot_be_written_for_hugging_face(tmp_path: Path) -> None:
    config = ModelConfig(**vars(read(tmp_path)) | {"n_layers": 4, "sliding_windows": (8, 16, 8, 16)})
    with pytest.raises(MistralError, match=r"8, 16, 8, 16"):
        hugging_face_config(config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_that_params_json_does_not_state_is_that_of_the_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    random_checkpoint(tmp_path / "hf")
    as_mistral_layout(tmp_path / "hf", tmp_path / "own")
    path = tmp_path / "own" / "consolidated.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    assert read_config(tmp_path / "own").dtype == str(dtype).removeprefix("torch.")
