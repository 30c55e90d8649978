"""Builds by methods that look at a text: gone on with to the same bytes, and refused where memory or a text lacks."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_checkpoint
from program import assert_one_sentence, mistral
from test_quant_checkpoint import INT4, SHAPE, build, card
from test_quant_resume import contents, stop_after

from mistralcli.calibration import LayerwiseCalibration
from mistralcli.calibration_text import CalibrationSize, text_of_file, text_of_model
from mistralcli.config import read_config
from mistralcli.errors import NotEnoughMemoryError, UsageError
from mistralcli.layerwise import LayerwiseModel
from mistralcli.quantizing import open_job, recipe_of
from mistralcli.tokenizer import load_tokenizer
from quant.build_plan import Recipe, open_model, plan_build
from quant.memory import peak_with_data
from quant.methods.table import METHODS
from quant.scheme import default_head_scheme, parse_scheme

CPU = torch.device("cpu")
WITH_DATA = [method for method in METHODS.values() if method.needs_data]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("calibrated") / "source"
    random_checkpoint(directory, dtype="bfloat16", **SHAPE)
    return directory


def calibration(source: Path, seed: int = 0) -> LayerwiseCalibration:
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(seed))
    return LayerwiseCalibration(LayerwiseModel(source), ids, "random ids")


def options(source: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"method": METHODS[name], "calibration": calibration(source), **more}


@pytest.mark.parametrize("name", [method.name for method in WITH_DATA])
def test_stopped_in_any_layer_it_goes_on_to_the_same_bytes(name: str, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "expected", INT4, **options(source, name))
    for n_calls in (8, 17, 26):  # in the first layer, the second and the third
        stop_after(source, tmp_path / "build", n_calls, scheme=INT4, **options(source, name))
        build(source, tmp_path / "build", INT4, resume=True, **options(source, name))
        assert contents(tmp_path / "build") == contents(tmp_path / "expected")
        shutil.rmtree(tmp_path / "build")


def test_a_target_size_is_measured_and_met_on_the_text_and_survives_a_stop(
    source: Path, tmp_path: Path
) -> None:
    target = {"target_bytes": 330_000}
    build(source, tmp_path / "expected", INT4, **options(source, "gptq", **target))
    assert sum(map(len, contents(tmp_path / "expected").values())) <= 330_000
    for n_calls in (17, 47):  # while bits are decided, and while they are written
        stop_after(source, tmp_path / "build", n_calls, scheme=INT4, **options(source, "gptq", **target))
        build(source, tmp_path / "build", INT4, resume=True, **options(source, "gptq", **target))
        assert contents(tmp_path / "build") == contents(tmp_path / "expected")
        shutil.rmtree(tmp_path / "build")


def test_another_text_is_refused(source: Path, tmp_path: Path) -> None:
    stop_after(source, tmp_path / "build", 20, scheme=INT4, **options(source, "gptq"))
    other = options(source, "gptq") | {"calibration": calibration(source, seed=1)}
    with pytest.raises(UsageError, match="was begun with calibration"):
        build(source, tmp_path / "build", INT4, resume=True, **other)


def test_the_card_names_method_and_text(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", INT4, **options(source, "gptq"))
    made = card(tmp_path / "build")
    assert made["method"] == "gptq"
    assert made["calibration"] == dict(calibration(source).description)
    assert not list((tmp_path / "build").glob("*.hidden"))


def test_a_file_gives_windows_of_its_whole_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    text = " ".join(str(number) for number in range(2000))
    (tmp_path / "text.txt").write_text(text)
    tokenizer = load_tokenizer(tiny_model_dir)
    ids = tokenizer.encode(text)
    found = text_of_file(tiny_model_dir, tmp_path / "text.txt", CalibrationSize(4, 64))
    assert found.name == "text.txt" and found.token_ids.shape == (4, 64)
    for i, row in enumerate(found.token_ids.tolist()):
        start = i * (len(ids) // 4)
        assert row == [tokenizer.bos_id, *ids[start : start + 63]]
    fewer = text_of_file(tiny_model_dir, tmp_path / "text.txt", CalibrationSize(10**6, 64))
    assert len(fewer.token_ids) == len(ids) // 63


def test_a_model_writes_the_same_text_every_time_and_does_not_end_it(tiny_model_dir: Path) -> None:
    first, second = (text_of_model(tiny_model_dir, CalibrationSize(3, 20), CPU) for _ in range(2))
    assert torch.equal(first.token_ids, second.token_ids) and first.token_ids.shape == (3, 20)
    assert first.name == "self" and len(set(map(tuple, first.token_ids.tolist()))) == 3
    assert not set(first.token_ids.flatten().tolist()) & set(read_config(tiny_model_dir).eos_ids)


def test_the_peak_with_data_is_that_of_the_formula(source: Path) -> None:
    plan = plan_build(open_model_of(source), Recipe(INT4, default_head_scheme(INT4), METHODS["gptq"]))
    peak = peak_with_data(plan.tensors, 1, method="gptq", n_seqs=4, n_tokens=32)
    layer = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 192 + 2 * 128)
    assert peak.layers == 2 * layer
    assert peak.tensors == 2 * (192 * 128 * 2)
    widths = (128 + 128) + 2 * (128 + 64) + (128 + 128) + 3 * (128 + 192)
    states = 4 * 32 * 128 * 4 + 2048 * widths * 4
    assert peak.calibration == 2 * states + 4 * 192**2 * 4 + (3 + 8) * 192 * 128 * 4
    assert (
        peak_with_data(plan.tensors, 1, method="awq", n_seqs=4, n_tokens=32).calibration
        == states + 192**2 * 4
    )


def open_model_of(source: Path) -> Any:
    from mistralcli.weights import open_checkpoint

    return open_model(open_checkpoint(source), source)


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        (["--method", "gptq"], 2, "--calib FILE"),
        (["--calib", "self"], 2, "looks at no text"),
        (["--calib-tokens", "512"], 2, "goes with --calib"),
        (["--method", "gptq", "--calib", "self", "--calib-tokens", "5"], 2, "too few"),
        (["--method", "gptq", "--scheme", "nf4", "--calib", "self"], 2, "nf4 chooses its codes itself"),
    ],
)
def test_calibrations_that_cannot_be_are_refused(
    flags: list[str], code: int, part: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    done = mistral("quantize", tiny_model_dir, *flags, "--no-check", home=tmp_path)
    assert_one_sentence(done, code, part)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", ["text.txt", "self"])
def test_memory_that_lacks_is_refused_with_a_calibration_that_would_fit(
    text: str, tiny_model_dir: Path
) -> None:
    job = open_job("tiny", tiny_model_dir, recipe_of(parse_scheme(), "gptq", [], None), text)
    limit = job.peak().total - 1
    with pytest.raises(NotEnoughMemoryError) as caught:
        job.require_memory(limit, check=False)
    found = re.search(r"--calib-tokens (\d+) would fit", str(caught.value.hint))
    assert found is not None
    smaller = open_job("tiny", tiny_model_dir, job.recipe, text, int(found[1]))
    assert smaller.peak().total <= limit and int(found[1]) < 16384
    with pytest.raises(NotEnoughMemoryError, match=r"more than the 1\.00 MB"):
        job.require_memory(10**6, check=False)


def test_gptq_on_a_text_of_the_model_s_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    flags = ["--method", "gptq", "--calib", "self", "--calib-tokens", "512", "--no-check"]
    made = mistral("quantize", tiny_model_dir, *flags, "-o", "./build", home=tmp_path)
    assert made.returncode == 0, made.stderr
    found = json.loads((tmp_path / "build" / "quantization_card.json").read_text())
    assert (found["method"], found["calibration"]["text"]) == ("gptq", "self")
