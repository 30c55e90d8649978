"""A build is compared with its source before it is called done, and its card says what was found."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_checkpoint
from program import assert_one_sentence, mistral

from mistralcli import check
from mistralcli.check import CHECK_TEXT, check_build, needed_bytes
from mistralcli.evaluate import measure_divergence, text_ids
from mistralcli.layerwise import LayerwiseModel
from mistralcli.tokenizer import load_tokenizer
from mistralcli.weights import open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.errors import QualityError
from quant.quality import LeftOut, Quality, default_max_kl
from quant.schemes.affine import Affine


def card_of(home: Path, name: str) -> dict[str, Any]:
    path = home / "data" / "mistral" / "models" / name / "quantization_card.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_card_has_what_eval_measures_on_the_text_that_it_names(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    done = mistral("quantize", tiny_model_dir, "-o", "one", home=tmp_path)
    assert done.returncode == 0 and "nats a token" in done.stderr, done.stderr
    card = card_of(tmp_path, "one")
    text = card["quality"]["text"]
    assert (text["name"], text["sha256"]) == (
        CHECK_TEXT.name,
        hashlib.sha256(CHECK_TEXT.read_bytes()).hexdigest(),
    )
    build = tmp_path / "data" / "mistral" / "models" / "one"
    ids = text_ids(load_tokenizer(build), CHECK_TEXT.read_text(encoding="utf-8"), 1024)
    expected = measure_divergence(
        LayerwiseModel(build), LayerwiseModel(tiny_model_dir), ids, window=text["window"]
    )
    assert text["n_tokens"] == expected.model.n_tokens
    assert card["quality"]["kl"]["mean"] == pytest.approx(expected.kl.mean, rel=1e-3)
    assert card["gate"]["kl"] == pytest.approx(expected.kl.mean, rel=1e-3) and card["gate"]["passed"]
    assert card["quality"]["perplexity"]["after"] == pytest.approx(expected.model.perplexity, rel=1e-4)
    assert card["quality"]["perplexity"]["before"] == pytest.approx(expected.base.perplexity, rel=1e-4)
    shown = mistral("show", "one", home=tmp_path).stdout
    assert text["sha256"] in shown and "99th percentile" in shown and "error of q_proj" in shown
    assert "model.layers.2.mlp.up_proj.weight" in mistral("show", "one", "--tensors", home=tmp_path).stdout


def test_a_build_above_the_limit_on_kl_fails_and_stays_marked(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = mistral("quantize", tiny_model_dir, "-o", "one", "--max-kl", "1e-5", home=tmp_path)
    assert_one_sentence(done, 10, "KL", "above the limit of 1e-05", "--max-kl")
    assert card_of(tmp_path, "one")["gate"]["passed"] is False
    assert_one_sentence(mistral("run", "Hi", "-m", "one", home=tmp_path), 10, "failed its quality gate")
    assert "FAILED" in mistral("show", "one", home=tmp_path).stdout


def test_without_a_check_nothing_is_measured_and_the_card_says_so(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert mistral("quantize", tiny_model_dir, "-o", "one", "--no-check", home=tmp_path).returncode == 0
    quality = card_of(tmp_path, "one")["quality"]
    assert quality["left_out"] == "it was not asked for" and quality["kl"] is None
    clash = mistral("quantize", tiny_model_dir, "-o", "two", "--no-check", "--max-kl", "1", home=tmp_path)
    assert_one_sentence(clash, 2, "--max-kl")


def test_a_model_without_a_tokenizer_is_not_checked_and_the_reason_is_said(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source")
    found = check_build(tmp_path / "source", tmp_path / "source")
    assert isinstance(found, LeftOut) and "no tokenizer" in found.reason


def test_a_tokenizer_of_another_model_leaves_the_check_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source")
    shutil.copy(tiny_model_dir / "tokenizer.model", tmp_path / "source")
    found = check_build(tmp_path / "source", tmp_path / "source")
    assert isinstance(found, LeftOut) and "32768 tokens and the model 96" in found.reason


def quality(kl: float) -> Quality:
    return Quality("text", "0" * 64, 100, 50, 10.0, 11.0, kl, 0.1, kl, kl, kl, 0.9)


@pytest.mark.parametrize(("kl", "passes"), [(0.9, True), (1.1, False)])
def test_the_gate_is_the_scheme_s_by_default(kl: float, passes: bool, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source")
    source, build, seen = tmp_path / "source", tmp_path / "build", list[set[str]]()

    def measured(directory: Path) -> Quality:
        seen.append({path.name for path in directory.iterdir()})
        return quality(kl)

    def make() -> None:
        quantize_checkpoint(
            open_checkpoint(source), source, build, Affine(4, 16), head_scheme=None, check=measured
        )

    if passes:
        make()
    else:
        with pytest.raises(QualityError, match=r"KL .* 1\.1 nats .* limit of 1;"):
            make()
    assert {"model.safetensors", "config.json"} <= seen[0]
    assert json.loads((build / "quantization_card.json").read_text())["gate"]["passed"] is passes
    assert default_max_kl(Affine(8)) == 0.1


def test_a_build_whose_tensors_are_too_far_off_is_not_checked(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source")
    source, build = tmp_path / "source", tmp_path / "build"

    def never(directory: Path) -> Quality:
        raise AssertionError("it failed already")

    with pytest.raises(QualityError, match="relative error"):
        quantize_checkpoint(
            open_checkpoint(source),
            source,
            build,
            Affine(4, 16),
            head_scheme=None,
            check=never,
            max_error=0.0,
        )
    reason = json.loads((build / "quantization_card.json").read_text())["quality"]["left_out"]
    assert "above its limit" in reason


def test_large_models_are_checked_on_less_of_the_text(tiny_model_dir: Path) -> None:
    from models import MISTRAL_7B

    small = LayerwiseModel(tiny_model_dir).config
    assert check.n_check_tokens(MISTRAL_7B) == 512 < check.n_check_tokens(small) == 1024
    with torch.device("meta"):
        assert needed_bytes(tiny_model_dir) > 32768 * 48 * 4
