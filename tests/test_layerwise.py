"""A model run layer by layer gives what it gives as a whole, in the memory of a layer."""

from pathlib import Path

import pytest
import torch
from models import SMALL, all_logits, load, random_checkpoint, token_ids
from test_parity import ATTENTION_KINDS
from test_weights import as_mistral_layout

from mistralcli.layerwise import LayerwiseModel
from mistralcli.weights import load_model, open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.scheme import Scheme, default_head_scheme
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4

TOLERANCE = 1e-4


def layerwise_logits(model: LayerwiseModel, ids: list[list[int]]) -> torch.Tensor:
    """(n_seqs, n_tokens, vocab_size)"""
    hidden = model.embed(torch.tensor(ids))
    for index in range(model.config.n_layers):
        hidden = model.run_layer(model.layer(index), hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_logits_agree_with_the_whole_model_for_every_kind_of_attention(kind: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, **ATTENTION_KINDS[kind])
    ids = [token_ids(41, seed=1), token_ids(41, seed=2)]
    found = layerwise_logits(LayerwiseModel(tmp_path), ids)
    model = load(tmp_path)
    expected = torch.stack([all_logits(model, one, chunk=16, slack=5) for one in ids])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "scheme", [Affine(4, 32, symmetric=False), Affine(4, 64), Affine(8), Float4()], ids=str
)
def test_logits_of_a_build_agree_with_its_exact_model(scheme: Scheme, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    random_checkpoint(tmp_path / "source", dtype="bfloat16", **sizes)
    source, build = tmp_path / "source", tmp_path / "build"
    quantize_checkpoint(
        open_checkpoint(source), source, build, scheme, head_scheme=default_head_scheme(scheme)
    )
    ids = token_ids(23)
    exact = load_model(build, device=torch.device("cpu"), dtype=torch.float32, exact=True)
    expected = all_logits(exact, ids, chunk=23, slack=23)
    found = layerwise_logits(LayerwiseModel(build), [ids])[0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_mistrals_own_layout_runs_too(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "hf", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    as_mistral_layout(tmp_path / "hf", tmp_path / "mistral")
    ids = [token_ids(23)]
    one, other = (layerwise_logits(LayerwiseModel(tmp_path / name), ids) for name in ("hf", "mistral"))
    torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_a_layer_from_given_weights_computes_with_them(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, dtype="bfloat16")
    model, checkpoint = LayerwiseModel(tmp_path), open_checkpoint(tmp_path)
    weights = {
        name: checkpoint.load(name) for name in checkpoint.names() if name.startswith("model.layers.1.")
    }
    hidden = model.embed(torch.tensor([token_ids(9)]))
    as_stored = model.run_layer(model.layer(1), hidden)
    assert torch.equal(model.run_layer(model.layer_from(1, weights), hidden), as_stored)
    scaled = {
        name: tensor * 2 if name.endswith("down_proj.weight") else tensor for name, tensor in weights.items()
    }
    changed = model.run_layer(model.layer_from(1, scaled), hidden)
    assert not torch.allclose(changed, as_stored)


def test_a_head_is_multiplied_in_tiles_that_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path, vocab_size=101)
    model = LayerwiseModel(tmp_path)
    hidden = torch.randn(2, 3, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    whole = model.logits(hidden)
    monkeypatch.setattr("mistralcli.layerwise._TILE_WEIGHTS", 7 * SMALL["hidden_size"])
    torch.testing.assert_close(model.logits(hidden), whole, atol=1e-5, rtol=0)
    assert whole.shape == (2, 3, 101)
