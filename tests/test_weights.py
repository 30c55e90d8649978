"""Checkpoints of both layouts load, and a damaged one is refused by naming what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, all_logits, load, random_checkpoint, token_ids
from safetensors.torch import load_file, save_file
from test_parity import TOLERANCE

from mistralcli.checkpoint_files import hugging_face_name
from mistralcli.config import hugging_face_config, read_config
from mistralcli.errors import IntegrityError, MistralError, ModelNotFoundError
from mistralcli.weights import loaded_sizes, open_checkpoint

MISTRAL_NAMES = {
    hugging_face_name(name): name
    for name in ["tok_embeddings", "norm", "output"]
    + [
        f"layers.{i}.{part}"
        for i in range(SMALL["num_hidden_layers"])
        for part in [
            *(f"attention.w{x}" for x in "qkvo"),
            *(f"feed_forward.w{x}" for x in "123"),
            "attention_norm",
            "ffn_norm",
        ]
    ]
}


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a rotate-half weight in Mistral's own order, where a pair's two rows are neighbours."""
    head_dim = weight.shape[0] // n_heads
    order = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(n_heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def as_mistral_layout(source: Path, target: Path, **changes: Any) -> None:
    """Write the Hugging Face checkpoint in `source` as consolidated.safetensors and params.json."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        heads = {"q_proj": SMALL["num_attention_heads"], "k_proj": SMALL["num_key_value_heads"]}.get(
            module.split(".")[-1]
        )
        tensors[f"{MISTRAL_NAMES[module]}.{suffix}"] = interleaved(tensor, heads) if heads else tensor
    target.mkdir()
    save_file(tensors, target / "consolidated.safetensors")
    params = {
        "dim": SMALL["hidden_size"],
        "n_layers": SMALL["num_hidden_layers"],
        "head_dim": SMALL["head_dim"],
        "hidden_dim": SMALL["intermediate_size"],
        "n_heads": SMALL["num_attention_heads"],
        "n_kv_heads": SMALL["num_key_value_heads"],
        "norm_eps": SMALL["rms_norm_eps"],
        "vocab_size": SMALL["vocab_size"],
    }
    (target / "params.json").write_text(json.dumps(params | changes))


def test_mistrals_own_layout_gives_the_logits_of_hugging_faces(tmp_path: Path) -> None:
    theta = {"rope_theta": 1e6, "rope_type": "default"}
    theirs = random_checkpoint(tmp_path / "hf", rope_parameters=theta)
    as_mistral_layout(tmp_path / "hf", tmp_path / "own")
    ids = token_ids(40)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        all_logits(load(tmp_path / "own"), ids, chunk=40, slack=40), expected, atol=TOLERANCE, rtol=0
    )
    assert open_checkpoint(tmp_path / "hf").names() == open_checkpoint(tmp_path / "own").names()


@pytest.mark.parametrize(
    ("params", "theta", "windows"),
    [
        ({}, 1e6, (None, None, None)),
        ({"sliding_window": 8}, 1e4, (8, 8, 8)),
        ({"sliding_window": [None, 8, 8]}, 1e4, (None, 8, 8)),
        ({"rope_theta": 1e8, "sliding_window": None}, 1e8, (None, None, None)),
    ],
)
def test_params_json_states_theta_and_windows_in_its_own_way(
    params: dict[str, Any], theta: float, windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    random_checkpoint(tmp_path / "hf")
    as_mistral_layout(tmp_path / "hf", tmp_path / "own", **params)
    config = read_config(tmp_path / "own")
    assert (config.rope_theta, config.sliding_windows) == (theta, windows)


def test_ministral_8b_is_known_by_its_shape_and_gets_its_real_windows(tmp_path: Path) -> None:
    stated = {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 131072}
    stated |= {
        "sliding_window": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "model_type": "mistral",
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert read_config(tmp_path).sliding_windows == (None, 32768, 32768, 32768) * 9


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def to_an_unknown_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.uint16)


def to_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (add, r"model\.layers\.3\.mlp\.up_proj\.weight does not belong"),
        (reshape, r"lm_head\.weight .* shape \[95, 48\] where .* \[96, 48\]"),
        (to_integers, r"model\.norm\.weight is stored as torch\.int32"),
        (to_an_unknown_type, r"model\.norm\.weight in .*model\.safetensors has the unknown type U16"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    random_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    for read in (load, open_checkpoint):  # to run it, and to quantize it
        with pytest.raises(MistralError, match=message):
            read(tmp_path)


def test_rows_of_mistrals_layout_that_make_no_heads_are_named(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "hf")
    as_mistral_layout(tmp_path / "hf", tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "consolidated.safetensors")
    name = "layers.0.attention.wq.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, tmp_path / "own" / "consolidated.safetensors")
    with pytest.raises(IntegrityError, match=r"layers\.0\.self_attn\.q_proj\.weight .* shape \[63, 48\]"):
        open_checkpoint(tmp_path / "own")


def test_a_head_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert load(tmp_path).output is None


@pytest.mark.parametrize("keep", [0, 5, 8, 1000, -1])
def test_a_truncated_file_is_an_integrity_error_that_names_it(keep: int, tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    theirs = random_checkpoint(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    lost = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(IntegrityError, match=lost.name):
        load(tmp_path / "shards")


def test_an_index_cannot_name_a_file_outside_its_directory(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="elsewhere"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", IntegrityError),
        ("[]", IntegrityError),
        ("[" * 100_000, IntegrityError),
        ('{"model_type": "mistral"}', IntegrityError),
        (
            '{"model_type": "mistral", "hidden_size": "x", "num_hidden_layers": 1, "num_attention_heads": 1}',
            IntegrityError,
        ),
        ('{"model_type": "llama"}', MistralError),
        ('{"model_type": "mistral", "rope_scaling": {"rope_type": "yarn"}}', MistralError),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_sentence(
    text: str, error: type[MistralError], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error):
        read_config(tmp_path)


def test_a_directory_without_a_model_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_config(tmp_path)
    random_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        load(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_size_that_is_planned_is_the_size_that_is_loaded(tied: bool, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, dtype="bfloat16", tie_word_embeddings=tied)
    loaded = sum(parameter.nbytes for parameter in load(tmp_path).parameters())
    assert loaded_sizes(tmp_path, torch.float32, "cpu").total == loaded


@pytest.mark.parametrize("window", [None, 8, [None, 8, 8]])
def test_a_configuration_written_for_hugging_face_reads_back_as_the_same(window: Any, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "hf")
    as_mistral_layout(tmp_path / "hf", tmp_path / "own", sliding_window=window)
    config = read_config(tmp_path / "own")
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(config)))
    assert read_config(tmp_path) == config
