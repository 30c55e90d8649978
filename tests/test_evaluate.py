"""Perplexity and KL: what transformers measures, whatever the windows, batches, tiles and passes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random_checkpoint, token_ids
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mistralcli import evaluate, scoring
from mistralcli.errors import MistralError, NotEnoughMemoryError, UsageError
from mistralcli.evaluate import measure_divergence, measure_perplexity, text_ids
from mistralcli.layerwise import LayerwiseModel
from mistralcli.scoring import cut_windows
from mistralcli.tokenizer import load_tokenizer
from mistralcli.weights import open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.schemes.affine import Affine

TEXT = "The ferry was late again, so we counted gulls: 12 on the mast, 7 on the wall.\n" * 3


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PreTrainedModel]]:
    """A small checkpoint, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("evaluated") / "model"
    yield directory, random_checkpoint(directory, dtype="bfloat16", sliding_window=11)


@pytest.fixture(scope="module")
def build(theirs: tuple[Path, PreTrainedModel]) -> Path:
    """An int4 build of it."""
    source, destination = theirs[0], theirs[0].with_name("build")
    quantize_checkpoint(open_checkpoint(source), source, destination, Affine(4, 16), head_scheme=Affine(8))
    return destination


def their_losses(model: PreTrainedModel, ids: list[int], window: int, stride: int) -> list[float]:
    """The loop of transformers' guide: labels of −100 where a token was scored before."""
    losses, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            logits = model(inputs).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none", ignore_index=-100)
        losses += nll[labels[0, 1:] != -100].tolist()
        before = end
        if end == len(ids):
            break
    return losses


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 20), (200, 200), (32, 31), (16, 1)])
def test_perplexity_is_that_of_transformers_guide(
    window: int, stride: int, theirs: tuple[Path, PreTrainedModel]
) -> None:
    ids = token_ids(150)
    losses = their_losses(theirs[1], ids, window, stride)
    found = measure_perplexity(LayerwiseModel(theirs[0]), ids, window=window, stride=stride)
    assert found.n_tokens == len(losses)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.window, found.stride) == (window, stride)


@given(st.integers(4, 200), st.integers(2, 90), st.data())
def test_windows_score_each_token_once_in_order(n_tokens: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    windows = cut_windows(n_tokens, window, stride)
    scored = [token for one in windows for token in range(one.first, one.stop)]
    unscored = set(range(n_tokens)) - set(scored)
    assert scored == sorted(set(scored))
    assert unscored == ({0} if stride < window else set(range(0, n_tokens, window)))
    assert all(one.start < one.first and one.n_tokens <= window for one in windows)


def test_neither_batches_nor_tiles_nor_passes_show_in_the_result(
    theirs: tuple[Path, PreTrainedModel], build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, base = token_ids(205), LayerwiseModel(theirs[0])
    expected = measure_divergence(LayerwiseModel(build), base, ids, window=20, stride=15)
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", {"cpu": 45})
    monkeypatch.setattr(scoring, "_LOGITS", {"cpu": 7 * 96})
    monkeypatch.setattr(scoring, "_MOST_HIDDEN_BYTES", {"cpu": 3 * 40 * 48 * 4 * 2})
    steps: list[tuple[int, int]] = []
    found = measure_divergence(
        LayerwiseModel(build), base, ids, window=20, stride=15, on_progress=lambda *done: steps.append(done)
    )
    assert found.kl.mean == pytest.approx(expected.kl.mean, rel=1e-4)
    assert found.model.perplexity == pytest.approx(expected.model.perplexity, rel=1e-5)
    assert found.top1_agreement == expected.top1_agreement
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)


def test_kl_is_that_of_the_distributions_that_transformers_gives(
    theirs: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    other = random_checkpoint(tmp_path, dtype="bfloat16", seed=1, initializer_range=0.2)
    ids = token_ids(60)
    with torch.no_grad():
        base, model = (one(torch.tensor([ids])).logits[0, :-1].double() for one in (theirs[1], other))
    p, q = base.log_softmax(-1), model.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).sort().values
    found = measure_divergence(LayerwiseModel(tmp_path), LayerwiseModel(theirs[0]), ids)
    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_max == pytest.approx(float(kl[-1]), rel=1e-4)
    assert found.kl_median == pytest.approx(float(kl[29]), rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(kl[58]), rel=1e-4)
    agreement = float((base.argmax(-1) == model.argmax(-1)).float().mean())
    assert found.top1_agreement.mean == pytest.approx(agreement)


def test_a_model_is_no_distance_from_itself(theirs: tuple[Path, PreTrainedModel]) -> None:
    found = measure_divergence(LayerwiseModel(theirs[0]), LayerwiseModel(theirs[0]), token_ids(40))
    assert (found.kl.mean, found.kl_max, found.top1_agreement.mean) == (0.0, 0.0, 1.0)
    assert found.model == found.base


def test_the_standard_error_is_that_of_independent_values_and_grows_with_their_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10_000, generator=generator, dtype=torch.float64)
    assert evaluate.estimate(noise).stderr == pytest.approx(0.01, rel=0.25)
    runs = noise[:1000].repeat_interleave(10)  # as good as a thousand values
    assert evaluate.estimate(runs).stderr == pytest.approx(1000**-0.5, rel=0.25)


@pytest.mark.parametrize(
    ("n_tokens", "window", "stride", "part"),
    [
        (2, None, None, "2 tokens"),
        (40, 1, None, "--window 1"),
        (40, 513, None, "--window 513"),
        (40, 8, 9, "--stride 9"),
        (40, 8, 0, "--stride 0"),
    ],
)
def test_lengths_that_cannot_be_are_refused(
    n_tokens: int, window: int | None, stride: int | None, part: str, theirs: tuple[Path, PreTrainedModel]
) -> None:
    with pytest.raises(UsageError, match=part):
        measure_perplexity(LayerwiseModel(theirs[0]), token_ids(n_tokens), window=window, stride=stride)


def test_too_little_memory_is_said_before_anything_is_loaded(theirs: tuple[Path, PreTrainedModel]) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"measuring takes .* are free"):
        measure_perplexity(LayerwiseModel(theirs[0]), token_ids(40), free_bytes=1000)


def test_logits_that_are_not_finite_are_no_result(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["lm_head.weight"] * torch.inf}, tmp_path / "model.safetensors"
    )
    with pytest.raises(MistralError, match="not finite"):
        measure_perplexity(LayerwiseModel(tmp_path), token_ids(40))


def test_eval_ppl_reads_files_and_pipes(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    done = mistral("eval", "ppl", tiny_model_dir, "text", "--window", "50", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    ids = text_ids(load_tokenizer(tiny_model_dir), TEXT)
    expected = measure_perplexity(LayerwiseModel(tiny_model_dir), ids, window=50)
    assert facts["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert facts["stderr"] == pytest.approx(expected.stderr, rel=1e-3)
    assert facts["n_tokens"] == expected.n_tokens
    piped = mistral("eval", "ppl", tiny_model_dir, "-", "-n", "20", home=tmp_path, stdin=TEXT)
    assert piped.returncode == 0 and "tokens scored  19\n" in piped.stdout


def test_eval_kl_compares_a_build_with_its_source(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert mistral("quantize", tiny_model_dir, "-o", "one", "-q", home=tmp_path).returncode == 0
    done = mistral("eval", "kl", "one", "--base", tiny_model_dir, "text", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert 0 < facts["kl_median"] <= facts["kl_p99"] <= facts["kl_max"] and facts["kl_mean"] > 0
    assert 0 < facts["top1_agreement"] <= 1


def test_models_with_different_tokenizers_are_not_compared(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = mistral("eval", "kl", "demo", "--base", tiny_model_dir, "-", home=tmp_path, stdin=TEXT)
    assert_one_sentence(done, 2, "different tokenizers")


@pytest.mark.slow
def test_the_loss_on_wikitext_is_the_golden_one(smollm2_dir: Path, shared_dir: Path) -> None:
    golden = json.loads((shared_dir / "data" / "smollm2_golden.json").read_text())["wikitext2_test_nll"]
    text = (shared_dir / "data" / golden["file"]).read_text(encoding="utf-8")[: golden["chars_covered"]]
    ids = text_ids(load_tokenizer(smollm2_dir), text, 4096)
    assert ids[-4:] == golden["last_4_ids"]
    for window, key in ((512, "windows_of_512_no_overlap"), (4096, "one_window_4096")):
        found = measure_perplexity(LayerwiseModel(smollm2_dir), ids, window=window)
        assert found.nll.mean == pytest.approx(golden[key]["mean_nll"], abs=2e-5)
        assert found.n_tokens == golden[key]["predicted_tokens"]
