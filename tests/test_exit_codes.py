"""Every exit code that README promises, from the program as a user runs it: one sentence and no traceback."""

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from hub_server import HubServer
from models import random_checkpoint
from program import MISTRAL, assert_one_sentence, environment, mistral

SMALL_LIMIT_BYTES = 200_000


def test_0_done(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert mistral("run", "Hi", "-m", tiny_model_dir, "-n", "1", home=tmp_path).returncode == 0


def test_1_a_model_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"")
    assert_one_sentence(mistral("run", "Hi", "-m", "./llama", home=tmp_path), 1, "'llama'", "mistral")


def test_2_a_value_out_of_range(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = mistral("run", "Hi", "-m", tiny_model_dir, "--min-p", "7", home=tmp_path)
    assert_one_sentence(done, 2, "min_p is 7.0", "between 0 and 1")


def test_2_no_command_shows_the_overview_and_no_empty_error(tmp_path: Path) -> None:
    done = mistral(home=tmp_path)
    assert done.returncode == 2
    assert "quantize" in done.stdout + done.stderr and "error:" not in done.stderr


@pytest.mark.parametrize("command", ["list --json", "--help", "run Hi -m MODEL", "quantize MODEL", "rm x -y"])
def test_2_standard_output_is_closed(command: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    done = redirected(command.replace("MODEL", str(tiny_model_dir)), ">&-", tmp_path)
    assert_one_sentence(done, 2, "standard output is closed")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_0_another_stream_is_closed(closed: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    done = redirected(f"run Hi -m {tiny_model_dir} -n 2 -t 0", closed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == mistral("run", "Hi", "-m", tiny_model_dir, "-n", "2", "-t", "0", home=tmp_path).stdout
    )
    assert done.stderr == "" or "2>&-" not in closed


def test_6_standard_output_is_full(tmp_path: Path) -> None:
    assert_one_sentence(redirected("list --json", "> /dev/full", tmp_path), 6, "full")


def redirected(command: str, redirection: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a shell with a stream redirected or closed."""
    script = f"{' '.join(MISTRAL)} {command} {redirection}"
    return subprocess.run(
        ["bash", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(home),
    )


@pytest.mark.parametrize("command", [["run", "Hi", "-m"], ["chat"], ["show"], ["quantize"], ["rm", "--yes"]])
def test_3_a_model_that_is_not_here(command: list[str], tmp_path: Path) -> None:
    assert_one_sentence(
        mistral(*command, "mistralai/None-7B", home=tmp_path, stdin="Hi"), 3, "mistralai/None-7B"
    )


def test_3_the_name_is_empty(tmp_path: Path) -> None:
    assert_one_sentence(mistral("run", "Hi", "-m", "", home=tmp_path), 3, "name is empty")


@pytest.mark.parametrize("name", ["./" + "x" * 300, "./two\nlines"])
def test_3_a_name_that_is_odd(name: str, tmp_path: Path) -> None:
    assert_one_sentence(mistral("show", name, home=tmp_path), 3, name.replace("\n", "\\n"))


def test_4_a_gated_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add("mistralai/Gated", tiny_model_dir, access="gated")
        done = mistral("pull", "mistralai/Gated", home=tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert_one_sentence(done, 4, "mistralai/Gated", hub.url)


def test_5_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with HubServer() as hub:
        closed = hub.url
    done = mistral("pull", "mistralai/Any", home=tmp_path, HF_ENDPOINT=closed, HF_HUB_OFFLINE="0")
    assert_one_sentence(done, 5, closed.removeprefix("http://"))


def test_6_a_disk_that_fills_up_leaves_no_build(tiny_model_dir: Path, tmp_path: Path) -> None:
    limited = subprocess.run(
        [*MISTRAL, "quantize", str(tiny_model_dir), "-o", "small"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_LIMIT_BYTES, SMALL_LIMIT_BYTES)),
    )
    assert_one_sentence(limited, 6, "small")
    assert list((tmp_path / "data" / "mistral" / "models").iterdir()) == []


def test_7_a_context_that_does_not_fit_names_one_that_does(tmp_path: Path, tiny_model_dir: Path) -> None:
    random_checkpoint(tmp_path / "long", max_position_embeddings=10**9, vocab_size=32768)
    shutil.copy(tiny_model_dir / "tokenizer.model", tmp_path / "long")
    done = mistral("run", "Hi", "-m", "./long", "--ctx", str(10**9), home=tmp_path)
    assert_one_sentence(done, 7, "1000000000", "GB", "--ctx 32768 would fit")


def test_8_a_prompt_that_leaves_no_room_is_refused_with_numbers(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = mistral("run", "word " * 100, "-m", tiny_model_dir, "--ctx", "64", home=tmp_path)
    assert_one_sentence(done, 8, "104 tokens", "64", "41 tokens", "longer --ctx")


def test_8_no_longer_context_is_offered_than_the_model_has(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = mistral("run", "word " * 2000, "-m", tiny_model_dir, home=tmp_path)
    assert_one_sentence(done, 8, "2004 tokens", "a context of 1024", "shorten it by 981 tokens")
    assert "--ctx" not in done.stderr


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.model", "config.json"])
def test_9_a_damaged_file_is_named(victim: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    path = tmp_path / "damaged" / victim
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_one_sentence(mistral("run", "Hi", "-m", "./damaged", home=tmp_path), 9, victim)


def test_10_a_build_that_is_worse_than_its_limit_is_marked_and_not_run(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = mistral("quantize", tiny_model_dir, "-o", "bad", "--max-error", "0.01", home=tmp_path)
    assert_one_sentence(made, 10, "0.01", "model.layers.")
    assert_one_sentence(mistral("run", "Hi", "-m", "bad", home=tmp_path), 10, "bad")
    assert "bad" in mistral("list", home=tmp_path).stdout


def test_130_ctrl_c(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The process dies of SIGINT itself, which a shell shows as 130 and which stops its loops."""
    command = subprocess.Popen(
        [*MISTRAL, "run", "Hi", "-m", str(tiny_model_dir), "-t", "2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )
    assert command.stdout is not None and command.stdout.read(1)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert command.returncode == -signal.SIGINT and b"Traceback" not in said


def test_141_a_reader_that_left(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = f"{' '.join(MISTRAL)} run Hi -q -t 2 -m {tiny_model_dir} < /dev/null"
    script = f"{run} | head -c 1 > head; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, env=environment(tmp_path), cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == (b"141\n", b"")


@pytest.mark.parametrize("command", ["--help", "--version", "run --help", "list --help"])
def test_141_a_reader_of_the_help_that_left(command: str, tmp_path: Path) -> None:
    """The reading end is closed before the program starts, so that it cannot be in time."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*MISTRAL, *command.split()], stdout=writing, stderr=subprocess.PIPE, env=environment(tmp_path)
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
