"""`mistral quantize` and what comes after it: names, refusals, layouts, and builds that run, are listed and removed."""

import json
import shutil
from pathlib import Path

import pexpect
import pytest
import torch
from models import all_logits, load, random_checkpoint, token_ids
from program import MISTRAL, assert_one_sentence, environment, mistral
from safetensors.torch import load_file
from test_weights import as_mistral_layout


def test_a_build_is_named_after_model_and_scheme_and_can_be_used_by_that_name(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = mistral("quantize", tiny_model_dir, home=tmp_path)
    assert (made.returncode, made.stdout) == (0, "tiny-int4\n"), made.stderr
    assert "bits a quantized weight" in made.stderr and "\x1b" not in made.stderr
    assert mistral("run", "Hi", "-m", "tiny-int4", "-n", "3", home=tmp_path).returncode == 0
    (listed,) = json.loads(mistral("list", "--json", home=tmp_path).stdout)
    assert listed["name"] == "tiny-int4" and listed["scheme"] == "int4-g128" and listed["broken"] is None
    assert mistral("rm", "tiny-int4", "--yes", home=tmp_path).returncode == 0
    assert json.loads(mistral("list", "--json", home=tmp_path).stdout) == []


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--bits", "8"], "tiny-int8"),
        (["--group-size", "32"], "tiny-int4-g32"),
        (["--asymmetric"], "tiny-int4-asym"),
        (["--bits", "8", "--group-size", "64"], "tiny-int8-g64"),
        (["--scheme", "nf4"], "tiny-nf4"),
        (["--scheme", "llm.int8"], "tiny-llm.int8"),
    ],
)
def test_every_scheme_makes_a_build_that_answers(
    flags: list[str], name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = mistral("quantize", tiny_model_dir, *flags, "-q", home=tmp_path)
    assert (made.returncode, made.stdout) == (0, f"{name}\n"), made.stderr
    done = mistral("run", "Hi", "-m", name, "-n", "3", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3


def test_a_name_with_a_separator_is_a_directory(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = mistral("quantize", tiny_model_dir, "-o", "./here/build", home=tmp_path)
    assert (made.returncode, made.stdout) == (0, "./here/build\n"), made.stderr
    assert (tmp_path / "here" / "build" / "config.json").is_file()
    assert mistral("show", "./here/build", home=tmp_path).returncode == 0


def test_an_existing_build_is_replaced_only_with_force(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert mistral("quantize", tiny_model_dir, "-o", "one", home=tmp_path).returncode == 0
    assert_one_sentence(mistral("quantize", tiny_model_dir, "-o", "one", home=tmp_path), 2, "one", "--force")
    again = mistral("quantize", tiny_model_dir, "-o", "one", "--bits", "8", "--force", home=tmp_path)
    assert again.returncode == 0, again.stderr
    card = tmp_path / "data" / "mistral" / "models" / "one" / "quantization_card.json"
    assert json.loads(card.read_text())["scheme"] == "int8"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--bits", "3"], "3"),
        (["--group-size", "100"], "100"),
        (["--scheme", "nf4", "--group-size", "64"], "nf4"),
        (["--scheme", "int4", "--bits", "8"], "int4"),
        (["--scheme", "q5"], "q5"),
        (["-o", "bad:name"], "bad:name"),
        (["-o", "./" + "x" * 300], "longer than"),
        (["--max-error", "-1"], "--max-error is -1.0"),
        (["--max-error", "nan"], "--max-error is nan"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    flags: list[str], part: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert_one_sentence(mistral("quantize", tiny_model_dir, *flags, home=tmp_path), 2, part)
    assert not (tmp_path / "data").exists()


def test_a_build_has_a_name_also_when_its_model_s_has_blanks(tiny_model_dir: Path, tmp_path: Path) -> None:
    named = tmp_path / "My (Model)..v0.3"
    shutil.copytree(tiny_model_dir, named)
    made = mistral("quantize", f"./{named.name}", "-q", home=tmp_path)
    assert (made.returncode, made.stdout) == (0, "my-model-v0.3-int4\n"), made.stderr


def test_what_is_no_build_is_not_replaced_and_force_is_not_offered(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    for force in ([], ["--force"]):
        done = mistral("quantize", tiny_model_dir, "-o", "./mine", *force, home=tmp_path)
        assert_one_sentence(done, 2, "is not a build")
        assert "--force" not in done.stderr


def test_the_summary_counts_the_layers_of_each_scheme(tmp_path: Path, tiny_model_dir: Path) -> None:
    random_checkpoint(tmp_path / "odd", hidden_size=128, intermediate_size=160, vocab_size=32768)
    shutil.copy(tiny_model_dir / "tokenizer.model", tmp_path / "odd")
    made = mistral("quantize", "./odd", "--no-check", home=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "layers: 15 in int4-g128, 3 in int4-g32, 3 in int4-g64, 1 in int8, " in made.stderr


def test_a_quiet_quantize_says_nothing_at_a_terminal_but_the_name(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = [*MISTRAL, "quantize", str(tiny_model_dir), "-q"]
    child = pexpect.spawn(command[0], command[1:], env=environment(tmp_path), encoding="utf-8", timeout=120)
    child.expect(pexpect.EOF)
    assert child.before == "tiny-int4\r\n"


def test_a_build_of_mistrals_own_layout_is_that_of_hugging_faces(tmp_path: Path) -> None:
    theta = {"rope_theta": 1e6, "rope_type": "default"}
    random_checkpoint(tmp_path / "hf", dtype="bfloat16", rope_parameters=theta, max_position_embeddings=32768)
    as_mistral_layout(tmp_path / "hf", tmp_path / "own")
    for name in ("hf", "own"):
        made = mistral("quantize", f"./{name}", "-o", f"./{name}-int8", "--bits", "8", home=tmp_path)
        assert made.returncode == 0, made.stderr
    ours, theirs = (load_file(tmp_path / f"{name}-int8" / "model.safetensors") for name in ("own", "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logits = [
        all_logits(load(tmp_path / f"{n}-int8"), token_ids(20), chunk=20, slack=20) for n in ("own", "hf")
    ]
    assert torch.equal(*logits)


def test_a_source_without_a_tokenizer_is_warned_of_before_the_work(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    made = mistral("quantize", "./mute", home=tmp_path)
    assert made.returncode == 0
    warning, report = made.stderr.splitlines()
    assert warning.startswith("warning: ") and "tokenizer.json" in warning and "tokenizer.model" in warning
    assert "bits a quantized weight" in report
    assert mistral("quantize", "./mute", "--force", "-q", home=tmp_path).stderr == ""
    assert "warning" not in mistral("quantize", tiny_model_dir, home=tmp_path).stderr
