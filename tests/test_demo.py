"""The model in the package: what `mistral` runs when none is named, small, whole and made as its recipe says."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from program import environment, mistral

from mistralcli.conversation import Conversation
from mistralcli.demo import demo_directory
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import open_session
from mistralcli.weights import open_checkpoint

ORIGINAL = Path(__file__).resolve().parent.parent / "training" / "original"
STORY = "Tell me a story about a fox."


def test_without_a_model_the_demo_answers_and_says_so_with_the_command_for_a_real_one(tmp_path: Path) -> None:
    done = mistral("run", STORY, "-t", "0", "-n", "80", home=tmp_path)
    assert done.returncode == 0 and "fox" in done.stdout
    note, *compiling, statistics = done.stderr.splitlines()
    assert "demo" in note and "mistral pull mistralai/" in note
    assert statistics.startswith("prompt ")
    assert not compiling or "kernels" in compiling[0]  # where this is the first that runs here


def test_the_demo_answers_a_pipe_and_a_piped_chat(tmp_path: Path) -> None:
    for command in ("run", "chat"):
        done = mistral(command, "-t", "0", home=tmp_path, stdin="What is the capital of France?\n")
        assert done.returncode == 0 and "Paris" in done.stdout
        assert "built-in demo" in done.stderr


def test_a_model_that_is_configured_is_not_the_demo(tmp_path: Path) -> None:
    done = mistral("run", "Hi", home=tmp_path, MISTRAL_CLI_MODEL="no-such-build")
    assert done.returncode == 3 and "no-such-build" in done.stderr and done.stdout == ""


def test_quiet_says_nothing_and_a_demo_that_is_named_needs_no_note(tmp_path: Path) -> None:
    assert mistral("run", "Hi", "-q", "-n", "2", home=tmp_path).stderr == ""
    assert "no model was named" not in mistral("run", "Hi", "-m", "demo", "-n", "2", home=tmp_path).stderr
    assert "fits here" in mistral("show", "demo", home=tmp_path).stdout


def test_the_build_is_at_most_8_mb_and_loads_within_a_second() -> None:
    assert sum(path.stat().st_size for path in demo_directory().iterdir()) <= 8_000_000
    started = time.process_time()
    open_session(demo_directory(), SessionOptions(device="cpu"))
    assert time.process_time() - started < 1


def test_the_original_is_at_most_24_mb_and_its_layers_have_whole_groups() -> None:
    assert sum(path.stat().st_size for path in ORIGINAL.iterdir()) <= 24_000_000
    source = open_checkpoint(ORIGINAL)
    matrices = [source.spec(name).shape for name in source.names() if name.endswith("_proj.weight")]
    assert len(matrices) == 42 and all(in_features % 128 == 0 for _, in_features in matrices)


@pytest.mark.parametrize(
    "scheme",
    [["--bits", "4"], ["--bits", "8"], ["--scheme", "nf4"], ["--scheme", "llm.int8"]],
    ids=lambda one: one[-1],
)
def test_the_original_makes_a_build_of_every_scheme_that_answers(scheme: list[str], tmp_path: Path) -> None:
    made = mistral("quantize", ORIGINAL, "-o", "./build", *scheme, home=tmp_path)
    assert made.returncode == 0, made.stderr
    done = mistral("run", STORY, "-m", "./build", "-t", "0", "-n", "60", home=tmp_path)
    assert done.returncode == 0 and "fox" in done.stdout


def test_the_build_in_the_package_is_what_quantize_makes_of_the_original(tmp_path: Path) -> None:
    """Up to codes that lie between two, which other processors may round to the other side."""
    assert mistral("quantize", ORIGINAL, "-o", "./build", "--method", "rtn", home=tmp_path).returncode == 0
    shipped, made = open_checkpoint(demo_directory()), open_checkpoint(tmp_path / "build")
    assert shipped.names() == made.names()
    for name in shipped.names():
        ours, theirs = (one.load(name).view(torch.uint8) for one in (shipped, made))
        assert (ours == theirs).float().mean() > 0.99, name


def test_a_chat_of_three_turns_remembers_a_name() -> None:
    session = open_session(demo_directory(), SessionOptions(device="cpu"))
    conversation, answers = Conversation(), list[str]()
    for text in ("Hi, my name is Vera.", "Why is the sky blue?", "What is my name?"):
        conversation = conversation.add("user", text)
        answers.append("".join(session.complete_chat(conversation, SamplingParams(temperature=0.0))))
        conversation = conversation.add("assistant", answers[-1])
    assert "Vera" in answers[0] and "blue" in answers[1] and "Vera" in answers[2]


def test_the_demo_is_answered_without_the_packages_that_take_seconds_to_import(tmp_path: Path) -> None:
    """bitsandbytes alone takes twice as long as all the rest."""
    script = (
        "import sys; sys.argv = ['mistral', 'run', '-q', '-n', '2', 'Hi']\n"
        "from mistralcli.cli.app import main\n"
        "assert main() == 0\n"
        "print(sorted({'bitsandbytes', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
