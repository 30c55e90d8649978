"""`mistral bench` measures the demo, prints a table or JSON, and compares with an earlier report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, random_checkpoint
from program import assert_one_sentence, mistral

from mistralcli.bench import BenchOptions, bytes_per_token, fitting, step_weights_bytes
from mistralcli.cli.commands.bench import refuse_too_long
from mistralcli.demo import demo_directory
from mistralcli.engine import Engine
from mistralcli.errors import UsageError
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session

SHORT = ("--device", "cpu", "-p", "9", "-p", "20", "-d", "12", "-n", "3", "-r", "1")


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    done = mistral("bench", "-m", "demo", "--json", *SHORT, home=home)
    assert done.returncode == 0, done.stderr
    assert "measuring pre-fill of 9 tokens" in done.stderr
    (home / "report.json").write_text(done.stdout)
    return home / "report.json"


@pytest.fixture
def report(report_file: Path) -> dict[str, Any]:
    return dict(json.loads(report_file.read_text()))


def test_a_report_has_speeds_memory_and_the_share_of_the_bandwidth(report: dict[str, Any]) -> None:
    assert (report["model"], report["device"], report["dtype"]) == ("demo", "cpu", "float32")
    assert [row["n_tokens"] for row in report["prefill"]] == [9, 20]
    (row,) = report["decode"]
    assert row["position"] == 12
    share = row["bytes_per_token"] * row["tokens_per_s"] / report["read_bytes_per_s"]
    assert row["bandwidth_share"] == pytest.approx(share)
    assert 0 < report["weights_bytes"] < report["peak_bytes"] and report["load_s"] > 0


def test_a_later_run_is_compared_with_an_earlier_one(report_file: Path, tmp_path: Path) -> None:
    arguments = ("bench", "-m", "demo", *SHORT, "-p", "5", "--against", report_file)
    done = mistral(*arguments, "-q", home=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][-2:] == ["BEFORE", "CHANGE"]
    (compared,) = [line for line in lines if line[:2] == ["pre-fill", "9"]]
    (new,) = [line for line in lines if line[:2] == ["pre-fill", "5"]]
    assert compared[-1].endswith("%") and new[-2:] == ["-", "-"]
    as_json = json.loads(mistral(*arguments, "-q", "--json", home=tmp_path).stdout)
    assert as_json["against"].keys() == {"prefill", "decode"} and as_json["against"]["decode"].keys() == {
        "12"
    }


def test_other_conditions_than_before_are_said(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(report | {"device_name": "an abacus"}))
    done = mistral("bench", "-m", "demo", *SHORT, "--against", tmp_path / "old.json", home=tmp_path)
    assert "warning: device_name was an abacus" in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"prefill": [{}], "decode": []}',
        '{"prefill": [{"n_tokens": 1e400, "tokens_per_s": 1}], "decode": []}',
        "\x00",
    ],
)
def test_a_file_that_is_no_report_is_refused_before_anything_is_measured(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text(content)
    done = mistral("bench", "--against", tmp_path / "other", home=tmp_path)
    assert_one_sentence(done, 2, "is no report of mistral bench")
    assert_one_sentence(mistral("bench", "--against", tmp_path / "none", home=tmp_path), 2, "cannot be read")


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        (([5, 64], [], None, 3), "a prompt of 64 tokens and one behind it do not fit into a context of 64"),
        (([], [61, 62], None, 3), "3 tokens behind 62 do not fit into a context of 64"),
        (([], [], 33, 33), "runs of 33 tokens are longer than half of the context of 64"),
    ],
)
def test_a_length_that_was_asked_for_is_never_left_out(asked: tuple[Any, ...], part: str) -> None:
    refuse_too_long(64, [63], [61], 32, 3)
    with pytest.raises(UsageError, match=part):
        refuse_too_long(64, *asked)


def test_such_a_length_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = mistral("bench", "-m", "demo", "--device", "cpu", "-p", "9999", home=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "measuring" not in done.stderr


def test_what_is_longer_than_the_context_is_left_out_or_shortened() -> None:
    options = BenchOptions([8, 64, 512], [16, 400], 128, 3)
    assert fitting(options, 4096) == options
    assert fitting(options, 100) == BenchOptions([8, 64], [16], 50, 3)
    assert fitting(options, 8) == BenchOptions([7], [4], 4, 3)
    with pytest.raises(UsageError):
        fitting(options, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_the_weights_and_the_keys_in_sight(tied: bool, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=tied, sliding_window=8)
    model = load(tmp_path)
    config = model.config
    all_weights = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.tok_embeddings.weight.nbytes
    assert step_weights_bytes(model) == all_weights - (0 if tied else embedding)
    engine = Engine(model, max_seq_len=64, chunk=16, slack=4)
    engine.prefill([[1, 2, 3]])
    for position, in_sight in ((5, 5), (40, 8)):
        keys = 2 * config.n_layers * in_sight * config.n_kv_heads * config.head_dim * 4
        assert bytes_per_token(engine, position) == step_weights_bytes(model) + keys
    assert torch.equal(engine.cache.last, torch.tensor([2]))


def test_a_quantized_step_reads_about_what_the_build_holds() -> None:
    session = open_session(demo_directory(), SessionOptions(device="cpu"))
    stored = (demo_directory() / "model.safetensors").stat().st_size
    embedding = session.engine.model.tok_embeddings.weight
    widened = embedding.nbytes - embedding.numel() * 2  # from bfloat16, since it is the head too
    assert step_weights_bytes(session.engine.model) - widened == pytest.approx(stored, rel=0.1)
