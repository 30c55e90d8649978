"""The hidden states that methods with data look at are those of the model, and survive being saved."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from models import random_checkpoint, token_ids

from mistralcli import calibration as module
from mistralcli.calibration import LayerwiseCalibration
from mistralcli.checkpoint_files import find_weights
from mistralcli.errors import IntegrityError
from mistralcli.layerwise import LayerwiseModel
from mistralcli.ops import rms_norm, swiglu

LAYER = "model.layers.0."
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = tuple(f"{LAYER}{kind}.weight" for kind in KINDS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated")
    random_checkpoint(path, num_hidden_layers=1, sliding_window=9)
    return path


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_weights(directory)
    return {name: checkpoint.load(name) for name in checkpoint.names() if name.startswith(LAYER)}


def ids(seed: int = 1) -> torch.Tensor:
    return torch.tensor(token_ids(5 * 31, seed=seed)).view(5, 31)


def calibration_of(directory: Path, seed: int = 1) -> LayerwiseCalibration:
    return LayerwiseCalibration(LayerwiseModel(directory), ids(seed), "random ids")


def inputs(calibration: LayerwiseCalibration, directory: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """What the linears are given, of all batches one after the other."""
    seen: dict[str, list[torch.Tensor]] = {}
    calibration.run(0, weights_of(directory), names, lambda name, x: seen.setdefault(name, []).append(x))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_linears_are_observed_with_what_the_layer_gives_them(directory: Path) -> None:
    seen = inputs(calibration_of(directory), directory, set(NAMES))
    assert set(seen) == set(NAMES)
    model, weights = LayerwiseModel(directory), weights_of(directory)
    hidden = model.embed(ids()).flatten(0, 1)
    eps = model.config.norm_eps
    normalized = rms_norm(hidden, weights[f"{LAYER}input_layernorm.weight"], eps)
    after = hidden + seen[NAMES[3]] @ weights[NAMES[3]].T
    fed = rms_norm(after, weights[f"{LAYER}post_attention_layernorm.weight"], eps)
    between = swiglu(fed @ weights[NAMES[4]].T, fed @ weights[NAMES[5]].T)
    expected = (normalized, normalized, normalized, None, fed, fed, between)
    for name, x in zip(NAMES, expected, strict=True):
        assert x is None or torch.allclose(seen[name], x, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_the_last_observed_linear_is_not_computed_and_is_not_missed(
    name: str, directory: Path
) -> None:
    everything = inputs(calibration_of(directory), directory, set(NAMES))
    alone = inputs(calibration_of(directory), directory, {name})
    assert list(alone) == [name] and torch.equal(alone[name], everything[name])


def test_observing_moves_nothing_on_and_advancing_gives_the_layers_output(directory: Path) -> None:
    calibration, model = calibration_of(directory), LayerwiseModel(directory)
    inputs(calibration, directory, {NAMES[0]})
    calibration.advance(0, weights_of(directory))
    with torch.no_grad():
        output = model.run_layer(model.layer(0), model.embed(ids()))
    assert torch.allclose(calibration._hidden, output, rtol=1e-5, atol=1e-5)


def test_comparing_shows_the_inputs_of_both_models_each_after_its_own_layers(directory: Path) -> None:
    calibration, alone = calibration_of(directory), calibration_of(directory)
    exact = weights_of(directory)
    rough = {name: weight * 0.9 if weight.dim() == 2 else weight for name, weight in exact.items()}
    names = (NAMES[6], f"{LAYER}post_attention_layernorm.weight")
    for _ in range(2):  # the second time as if the layer came once more
        ours, theirs = compared(calibration, rough, exact, names)
        for name in names:
            assert torch.equal(theirs[name], inputs_of(alone, exact, name))
            assert not torch.equal(ours[name], theirs[name])
        calibration.advance_exact(0, exact)
        calibration.advance(0, rough)
        alone.advance(0, exact)
    assert calibration._exact is not None and torch.equal(calibration._exact, alone._hidden)


def compared(
    calibration: LayerwiseCalibration,
    weights: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    names: tuple[str, ...],
) -> list[dict[str, torch.Tensor]]:
    """What modules are given in both models, of all batches one after the other."""
    pairs: list[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]] = []
    calibration.compare(0, weights, exact, set(names), lambda one, other: pairs.append((one, other)))
    return [
        {name: torch.cat([seen[name] for seen in one]) for name in names} for one in zip(*pairs, strict=True)
    ]


def inputs_of(calibration: LayerwiseCalibration, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    calibration.run(0, weights, {name}, lambda name, x: parts.append(x))
    return torch.cat(parts)


def test_a_batch_of_any_size_gives_the_same(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inputs(calibration_of(directory), directory, {NAMES[6]})[NAMES[6]]
    for n_tokens in (1, 2 * 31, 3 * 31 + 5):
        monkeypatch.setattr(module, "BATCH_TOKENS", n_tokens)
        parts = inputs(calibration_of(directory), directory, {NAMES[6]})[NAMES[6]]
        assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5)


def test_hidden_states_survive_being_saved_bit_for_bit(directory: Path, tmp_path: Path) -> None:
    calibration, other = calibration_of(directory), calibration_of(directory)
    calibration.advance(0, weights_of(directory))
    assert_restored(other, calibration, tmp_path)
    assert other._exact is None
    calibration.advance_exact(0, weights_of(directory))
    assert_restored(other, calibration, tmp_path)
    assert torch.equal(other._exact, calibration._exact)


def assert_restored(other: LayerwiseCalibration, calibration: LayerwiseCalibration, tmp_path: Path) -> None:
    """`other` with the state of `calibration`."""
    calibration.save(tmp_path / "state")
    other.restore(tmp_path / "state")
    assert torch.equal(other._hidden, calibration._hidden)
    other.save(tmp_path / "again")
    assert (tmp_path / "state").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_state_of_another_text_is_refused(directory: Path, tmp_path: Path) -> None:
    calibration_of(directory, seed=2).save(tmp_path / "state")
    with pytest.raises(IntegrityError, match="of another text or model"):
        calibration_of(directory).restore(tmp_path / "state")


def test_a_damaged_state_is_refused(directory: Path, tmp_path: Path) -> None:
    calibration = calibration_of(directory)
    with pytest.raises(IntegrityError, match="cannot be read"):
        calibration.restore(tmp_path / "missing")
    calibration.save(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match="cannot be read"):
        calibration.restore(tmp_path / "state")


def test_the_description_names_the_text_and_its_size(directory: Path) -> None:
    one, other = calibration_of(directory).description, calibration_of(directory, seed=2).description
    assert (one["text"], one["n_seqs"], one["n_tokens"]) == ("random ids", 5, 31)
    assert len(one["sha256"]) == 64 and one["sha256"] != other["sha256"]
