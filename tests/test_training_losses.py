"""Losses on held-out text: by kind, by position, through the rolling cache."""

import math
from pathlib import Path

import pytest
import torch
from models import load, mean_nll, random_checkpoint, token_ids

from mistralcli.model import Transformer
from training.losses import (
    N_QUARTERS,
    QUARTER_TOKENS,
    losses_by_kind,
    losses_by_quarter,
    passages,
    token_losses,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory: Path = tmp_path_factory.mktemp("model")
    random_checkpoint(directory, sliding_window=24, num_hidden_layers=2, max_position_embeddings=2048)
    return load(directory)


def test_losses_are_those_of_one_pass_and_do_not_depend_on_the_ring(model: Transformer) -> None:
    ids = token_ids(700)
    rolling, full = token_losses(model, ids, slack=16), token_losses(model, ids, slack=700)
    assert rolling.shape == (699,)
    torch.testing.assert_close(rolling, full, atol=1e-4, rtol=1e-4)
    assert math.isclose(float(full.mean()), mean_nll(model, ids), rel_tol=1e-5)


def test_losses_by_kind_weigh_tokens_not_texts(model: Transformer) -> None:
    texts = {"long": [token_ids(41, seed=2)], "short": [token_ids(6, seed=3), token_ids(6, seed=4)]}
    losses = losses_by_kind(model, texts)
    assert losses.keys() == {"long", "short", "all"}
    assert math.isclose(losses["all"], (40 * losses["long"] + 10 * losses["short"]) / 50, rel_tol=1e-5)


def test_passages_take_kinds_in_turn_and_are_cut_to_length() -> None:
    texts = {"a": [[1] * 300] * 9, "b": [[2] * 400]}
    found = passages(texts)
    assert [len(ids) for ids in found] == [QUARTER_TOKENS] * 5
    assert found[0] == [1] * 300 + [2] * 200
    assert passages(texts, n_passages=2) == found[:2]


def test_every_quarter_reads_the_same_text(model: Transformer) -> None:
    """A model with a window of 24 sees no difference between quarters but in what comes before them."""
    parts = [token_ids(QUARTER_TOKENS, seed=seed) for seed in range(N_QUARTERS)]
    rolling, full = losses_by_quarter(model, parts), losses_by_quarter(model, parts, slack=2000)
    assert rolling == pytest.approx(full, abs=1e-4)
    assert max(rolling) - min(rolling) < 0.05 * rolling[0]
