"""A build that was stopped goes on where it was, and its bytes are those of one in one go."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, random_checkpoint
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file
from test_quant_checkpoint import SHAPE, build, run

from mistralcli.checkpoint_files import Checkpoint
from mistralcli.cli.commands.quantize import _build, _Limits
from mistralcli.quantizing import open_job, recipe_of
from quant.errors import DiskError, IntegrityError, UsageError
from quant.journal import Journal
from quant.scheme import parse_scheme
from quant.schemes.affine import Affine
from quant.staging import CARD, JOURNAL, can_be_resumed

NO_LIMITS = _Limits(max_error=None, max_kl=None, check=False, max_ram=None)
SMALL_SHARDS = {"max_shard_bytes": 100_000}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path / "source", dtype="bfloat16", **SHAPE | {"num_hidden_layers": 2})
    (tmp_path / "source" / "tokenizer.json").write_text("the tokenizer")
    return tmp_path / "source"


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def stop_after(source: Path, destination: Path, n_calls: int, **options: Any) -> None:
    """Begin a build and stop it when it reports progress for the `n_calls`-th time."""
    calls = []

    def count(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == n_calls:
            raise Stop

    with pytest.raises(Stop):
        build(source, destination, on_progress=count, **options)


def moments(source: Path, destination: Path, folder: Path, **options: Any) -> list[Path]:
    """Copies of the half-made build, as a killed process would leave it, at each report of progress."""
    copies: list[Path] = []

    def copy(done: int, total: int) -> None:
        copies.append(folder / f"at-{len(copies)}")
        shutil.copytree(destination.with_name(f"{destination.name}.partial"), copies[-1])

    build(source, destination, on_progress=copy, **options)
    return copies


def files_but_card(build: Path) -> list[Path]:
    return [path for path in build.iterdir() if path.name != CARD]


@pytest.mark.parametrize(
    "options", [{}, SMALL_SHARDS, {"target_bytes": 200_000}], ids=["one", "shards", "target"]
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected"
    copies = moments(source, expected, tmp_path, **options)
    n_tensors = len(load_file(source / "model.safetensors"))
    n_hashed = 1 + len(files_but_card(expected))  # the source's file, and the build's
    assert len(copies) == n_tensors * (2 if "target_bytes" in options else 1) + n_hashed
    for copy in copies[:: len(copies) // 12]:
        copy.rename(tmp_path / "build.partial")
        build(source, tmp_path / "build", resume=True, **options)
        assert contents(tmp_path / "build") == contents(expected), copy.name
        shutil.rmtree(tmp_path / "build")


def test_it_goes_on_with_the_next_layer(source: Path, tmp_path: Path) -> None:
    stop_after(source, tmp_path / "build", 13)
    records = [json.loads(line) for line in (tmp_path / "build.partial" / JOURNAL).read_text().splitlines()]
    done = {name for record in records[1:] for name in record["results"]}
    assert len(done) == 2 + 9 and "model.layers.0.mlp.up_proj.weight" in done
    calls: list[tuple[int, int]] = []
    build(source, tmp_path / "build", resume=True, on_progress=lambda now, total: calls.append((now, total)))
    sizes = {name: tensor.nbytes for name, tensor in load_file(source / "model.safetensors").items()}
    missing = sum(size for name, size in sizes.items() if name not in done)
    hashed = [source / "model.safetensors", *files_but_card(tmp_path / "build")]
    total = missing + sum(file.stat().st_size for file in hashed)
    assert calls[-1] == (total, total)


def test_a_process_that_was_killed_is_gone_on_with_by_another(source: Path, tmp_path: Path) -> None:
    killed = run("os.kill(os.getpid(), 9)", source, tmp_path / "build")
    assert killed.returncode == -signal.SIGKILL and can_be_resumed(tmp_path / "build")
    build(source, tmp_path / "build", resume=True)
    build(source, tmp_path / "expected")
    assert contents(tmp_path / "build") == contents(tmp_path / "expected")


def test_a_line_that_was_cut_off_counts_for_nothing(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "expected")
    stop_after(source, tmp_path / "build", 20)
    journal = tmp_path / "build.partial" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 40])
    build(source, tmp_path / "build", resume=True)
    assert contents(tmp_path / "build") == contents(tmp_path / "expected")


def test_a_journal_takes_records_after_one_that_was_cut_off(tmp_path: Path) -> None:
    Journal(tmp_path, {"scheme": "int4"}).add({"results": 1})
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes() + b'{"results": 2')
    again = Journal(tmp_path, {"scheme": "int4"})
    again.add({"results": 3})
    assert again.records == [{"results": 1}]
    assert Journal(tmp_path, {"scheme": "int4"}).records == [{"results": 1}, {"results": 3}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": Affine(8)}, 'scheme "int4-g64", not "int8"'),
        ({"head_scheme": None}, 'scheme of the head "int8", not none'),
        ({"max_error": 0.2}, "--max-error 0.3, not 0.2"),
        ({"target_bytes": 400_000}, "--target-size none, not 400000"),
        ({"max_shard_bytes": 5}, "shards of 2000000000, not 5"),
        ({"source_name": "other"}, 'name none, not "other"'),
    ],
)
def test_other_settings_are_refused_with_the_difference_and_nothing_is_lost(
    change: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    stop_after(source, tmp_path / "build", 20)
    before = contents(tmp_path / "build.partial")
    with pytest.raises(UsageError) as caught:
        build(source, tmp_path / "build", resume=True, **change)
    assert message in caught.value.message and "--resume" in str(caught.value.hint)
    assert contents(tmp_path / "build.partial") == before


def test_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    stop_after(source, tmp_path / "build", 20)
    weights = load_file(source / "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in weights.items()}, source / "model.safetensors")
    with pytest.raises(UsageError, match="was begun with source"):
        build(source, tmp_path / "build", resume=True)


def test_without_resume_a_half_made_build_is_started_over(source: Path, tmp_path: Path) -> None:
    stop_after(source, tmp_path / "build", 20)
    build(source, tmp_path / "build", Affine(8))
    assert json.loads((tmp_path / "build" / "quantization_card.json").read_text())["scheme"] == "int8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "source"]


def test_resume_without_a_half_made_build_makes_one(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", resume=True)
    assert load(tmp_path / "build")


def test_a_build_that_was_complete_but_for_its_last_step_is_completed(source: Path, tmp_path: Path) -> None:
    report = build(source, tmp_path / "build")
    expected = contents(tmp_path / "build")
    (tmp_path / "build" / JOURNAL).write_text('{"scheme": "int4-g64"}\n')
    again = build(source, tmp_path / "build", resume=True)
    assert contents(tmp_path / "build") == expected
    assert again.n_layers_by_scheme == report.n_layers_by_scheme
    with pytest.raises(UsageError, match="exists already"):
        build(source, tmp_path / "build", resume=True)


def test_a_disk_that_fills_up_leaves_what_is_done(source: Path, tmp_path: Path) -> None:
    filling = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    full = run(filling, source, tmp_path / "build")
    assert full.returncode == DiskError.exit_code and can_be_resumed(tmp_path / "build")
    build(source, tmp_path / "build", resume=True)
    build(source, tmp_path / "expected")
    assert contents(tmp_path / "build") == contents(tmp_path / "expected")


def test_a_damaged_model_leaves_nothing_to_go_on_with(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, source / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.norm"):
        build(source, tmp_path / "build")
    assert not (tmp_path / "build.partial").exists()


class Interrupted(Checkpoint):
    """A model whose second layer cannot be read, since somebody presses Ctrl-C."""

    def load(self, name: str) -> torch.Tensor:
        if ".layers.1." in name:
            raise Stop
        return super().load(name)


def test_the_command_says_how_to_go_on_and_does(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "data" / "mistral" / "models"
    job = open_job(str(tiny_model_dir), tiny_model_dir, recipe_of(parse_scheme(), "rtn", [], None))
    files = dict.fromkeys(job.model.source.names(), tiny_model_dir / "model.safetensors")
    source = Interrupted(tiny_model_dir, files, {})
    stopped = replace(job, model=replace(job.model, source=source))
    with pytest.raises(Stop):
        _build(stopped, "tiny-int4", models / "tiny-int4", NO_LIMITS, resume=False, force=False, quiet=False)
    assert capsys.readouterr().err.count("the same command with --resume goes on with it") == 1
    (half,) = json.loads(mistral("list", "--json", home=tmp_path).stdout)
    assert half["name"] == "tiny-int4.partial" and half["broken"] == "half-made"
    flags = ("--method", "rtn", "--resume", "--no-check")
    other = mistral("quantize", tiny_model_dir, *flags, "--keep", "lm_head=dense", home=tmp_path)
    assert_one_sentence(other, 2, "was begun with --keep")
    made = mistral("quantize", tiny_model_dir, *flags, home=tmp_path)
    assert (made.returncode, made.stdout) == (0, "tiny-int4\n"), made.stderr
    _build(job, "other", models / "other", NO_LIMITS, resume=True, force=False, quiet=False)
    assert "there is no half-made other to go on with" in capsys.readouterr().err
    assert contents(models / "tiny-int4") == contents(models / "other")


def test_the_command_says_that_it_starts_over(tiny_model_dir: Path, tmp_path: Path) -> None:
    half = tmp_path / "data" / "mistral" / "models" / "tiny-int4.partial"
    half.mkdir(parents=True)
    (half / JOURNAL).write_text('{"scheme": "int4"}\n')
    made = mistral("quantize", tiny_model_dir, "--no-check", home=tmp_path)
    assert made.returncode == 0 and "starting over: the half-made tiny-int4 is discarded" in made.stderr
    assert not half.exists()
