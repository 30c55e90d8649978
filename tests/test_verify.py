"""`mistral verify` finds what is wrong with a model's files, and names it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_checkpoint
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file

from mistralcli.verify import Verification, verify
from mistralcli.weights import open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verified") / "source"
    random_checkpoint(directory, dtype="bfloat16", hidden_size=64, intermediate_size=128)
    return directory


@pytest.fixture
def build(source: Path, tmp_path: Path) -> Path:
    """A new int4 build with an int8 head, in several files."""
    quantize_checkpoint(
        open_checkpoint(source),
        source,
        tmp_path / "build",
        Affine(4, 32),
        head_scheme=Affine(8),
        max_shard_bytes=60_000,
    )
    return tmp_path / "build"


def only_problem(directory: Path) -> str:
    (problem,) = verify(directory).problems
    return problem


def edit_card(build: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = build / "quantization_card.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def edit_tensors(build: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file of weights, and its hash in the card, so that only what is in it can be wrong."""
    tensors = load_file(build / file)
    change(tensors)
    save_file(tensors, build / file, metadata={"format": "pt"})
    data = (build / file).read_bytes()
    entry = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_card(build, lambda card: card["files"].update({file: entry}))


@pytest.mark.parametrize(
    "scheme",
    [Affine(4, 128), Affine(4, 32, symmetric=False), Affine(8), Float4(), LlmInt8()],
    ids=lambda scheme: scheme.name,
)
def test_a_build_of_any_scheme_is_as_its_card_says(scheme: Any, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(open_checkpoint(source), source, tmp_path / "build", scheme, head_scheme=None)
    steps: list[tuple[int, int]] = []
    found = verify(tmp_path / "build", lambda *done: steps.append(done))
    assert found.problems == [] and found.hashes_of == "card"
    assert found.n_hashed == len(list((tmp_path / "build").iterdir())) - 1  # all but the card
    assert steps == sorted(steps) and 0.9 < steps[-1][0] / steps[-1][1] <= 1


def test_a_changed_byte_is_found_in_any_file(build: Path) -> None:
    for path in sorted(build.iterdir()):
        if path.name == "quantization_card.json":
            continue
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        before = path.read_bytes()
        path.write_bytes(data)
        assert any(problem.startswith(f"{path.name} is damaged") for problem in verify(build).problems)
        path.write_bytes(before)
    assert verify(build).problems == []


def test_a_file_that_was_cut_is_named_with_both_sizes(build: Path) -> None:
    size = (build / "config.json").stat().st_size
    (build / "config.json").write_bytes((build / "config.json").read_bytes() + b"\n")
    assert only_problem(build) == f"config.json has {size + 1:,} bytes instead of {size:,}"


def test_a_tokenizer_that_came_later_is_no_part_of_the_build(build: Path) -> None:
    (build / "tekken.json").write_text("{}")
    (build / "README.md").write_text("mine")
    assert only_problem(build) == "tekken.json is not of the build: its card does not know it"


def test_a_scale_that_is_not_finite_is_named(build: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale"
    file = json.loads((build / "model.safetensors.index.json").read_text())["weight_map"][name]
    edit_tensors(build, file, lambda tensors: tensors[name].view(-1)[5].fill_(torch.nan))
    assert only_problem(build) == f"tensor {name} has values that are not finite"


def test_a_shape_that_the_configuration_does_not_have_is_named(build: Path) -> None:
    name = "model.norm.weight"
    file = json.loads((build / "model.safetensors.index.json").read_text())["weight_map"][name]
    edit_tensors(build, file, lambda tensors: tensors.update({name: torch.ones(63, dtype=torch.bfloat16)}))
    assert "model.norm.weight" in only_problem(build) and "[63]" in only_problem(build)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda card: card["tensors"].popitem(), "says nothing of it"),
        (lambda card: card["tensors"]["lm_head.weight"].update(scheme="nf4"), "lm_head.weight is int8"),
        (lambda card: card["tensors"].update({"model.norm.weight": {"scheme": "int4"}}), "is dense"),
        (lambda card: card["size_bytes"].update(after=1), "says 1"),
        (lambda card: card.pop("tensors"), "does not say which tensors"),
        (
            lambda card: card["files"].update({"model-x.safetensors": card["files"]["config.json"]}),
            "is missing",
        ),
    ],
)
def test_a_card_that_says_something_else_than_the_files_is_found(
    change: Callable[[dict[str, Any]], object], part: str, build: Path
) -> None:
    edit_card(build, change)
    assert part in only_problem(build)


@pytest.mark.parametrize("files", [{"../x": {"size_bytes": 1, "sha256": "0" * 64}}, {"x": 3}, [1]])
def test_a_card_with_odd_hashes_is_refused(files: Any, build: Path) -> None:
    edit_card(build, lambda card: card.update(files=files))
    assert any("quantization_card.json" in problem for problem in verify(build).problems)


def as_snapshot(source: Path, cache: Path) -> Path:
    """The files of `source` as the Hub's cache keeps them: large ones by SHA-256, small ones by git's hash."""
    repo, snapshot = cache / "models--me--tiny", cache / "models--me--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in source.iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        digest = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git
        (repo / "blobs" / digest).write_bytes(data)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
    return snapshot


def test_pulled_files_are_held_against_the_names_of_their_blobs(source: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(source, tmp_path)
    found = verify(snapshot)
    assert found == Verification("hub", len(list(source.iterdir())), found.n_tensors, found.size_bytes, [])
    for name in ("config.json", "model.safetensors"):
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data[:-2] + b"\0\0")
        assert any(problem.startswith(f"{name} is damaged") for problem in verify(snapshot).problems)
        blob.write_bytes(data)
    (snapshot / "generation_config.json").resolve().unlink()
    assert only_problem(snapshot) == "generation_config.json is missing"


def test_a_directory_without_hashes_is_checked_for_the_rest(source: Path, tmp_path: Path) -> None:
    found = verify(source)
    assert (found.hashes_of, found.n_hashed, found.problems) == (None, 0, [])


def test_the_command_names_what_is_wrong_and_ends_with_9(build: Path, tmp_path: Path) -> None:
    done = mistral("verify", build, home=tmp_path)
    assert done.returncode == 0 and "those of its card" in done.stdout, done.stderr
    (build / "config.json").write_bytes((build / "config.json").read_bytes() + b" ")
    assert_one_sentence(mistral("verify", build, home=tmp_path), 9, "config.json has")
    done = mistral("verify", build, "--json", home=tmp_path)
    facts = json.loads(done.stdout)
    assert done.returncode == 9 and not facts["ok"] and "config.json" in facts["problems"][0]


def test_a_newer_format_is_refused_by_name(build: Path, tmp_path: Path) -> None:
    edit_card(build, lambda card: card.update(format_version=2))
    for command in (("verify", build), ("run", "Hi", "-m", build)):
        assert_one_sentence(mistral(*command, home=tmp_path), 1, "format version 2", "reads 1 to 1")
    shutil.rmtree(build)
