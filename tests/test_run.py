"""`mistral run` in a process of its own: sources of the prompt, flags, pipes, signals."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from program import MISTRAL, assert_one_sentence, environment, mistral


def answer(tiny: Path, home: Path, *arguments: str | Path, stdin: str = "") -> dict[str, object]:
    """The object that --json prints for a short greedy answer."""
    done = mistral("run", *arguments, "-m", tiny, "-t", "0", "-n", "6", "--json", home=home, stdin=stdin)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_only_the_completion_is_on_stdout_and_statistics_are_on_stderr(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    done = mistral("run", "Hello", "-m", tiny_model_dir, "-t", "0", "-n", "12", home=tmp_path)
    as_json = answer(tiny_model_dir, tmp_path, "Hello")
    assert done.returncode == 0
    assert done.stdout.startswith(str(as_json["text"]))
    assert "answer 12 tokens" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_json_has_every_promised_field(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = answer(tiny_model_dir, tmp_path, "Hello")
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == found["usage"]["completion_tokens"] == 6  # type: ignore[arg-type,index]
    assert found["usage"]["prompt_tokens"] == 4  # type: ignore[index]  # <s> [INST] ▁Hello [/INST]
    assert set(found["timings"]) == {"load_s", "prefill_s", "decode_s"}  # type: ignore[call-overload]
    assert isinstance(found["seed"], int) and found["model"] == str(tiny_model_dir)


def test_the_prompt_comes_from_argument_file_and_pipe_in_this_order(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("from a file\n")
    everything = answer(tiny_model_dir, tmp_path, "argument", "-f", "prompt.txt", stdin="from a pipe\n")
    assert (
        everything["text"]
        == answer(tiny_model_dir, tmp_path, "argument\n\nfrom a file\n\nfrom a pipe")["text"]
    )
    piped = answer(tiny_model_dir, tmp_path, stdin="from a pipe\n")
    assert piped["token_ids"] == answer(tiny_model_dir, tmp_path, "from a pipe")["token_ids"]
    assert (
        piped["token_ids"] == answer(tiny_model_dir, tmp_path, "-f", "-", stdin="from a pipe\n")["token_ids"]
    )


def test_a_file_and_a_pipe_give_the_same_prompt_without_its_byte_order_mark(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    text = "\ufeffone\r\ntwo\r\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    expected = answer(tiny_model_dir, tmp_path, "one\r\ntwo")["usage"]
    assert answer(tiny_model_dir, tmp_path, "-f", "prompt.txt")["usage"] == expected
    assert answer(tiny_model_dir, tmp_path, stdin=text)["usage"] == expected


def test_raw_uses_no_template_and_system_is_part_of_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    count = {
        name: answer(tiny_model_dir, tmp_path, "Hello", *flags)["usage"]["prompt_tokens"]  # type: ignore[index]
        for name, flags in {"raw": ["--raw"], "chat": [], "system": ["--system", "Be brief."]}.items()
    }
    assert count["raw"] == 2 and count["chat"] == 4 and count["system"] > 6


def test_a_seed_repeats_the_answer_and_another_does_not(tiny_model_dir: Path, tmp_path: Path) -> None:
    def sampled(*flags: str) -> dict[str, object]:
        done = mistral(
            "run", "Hi", "-m", tiny_model_dir, "-t", "2", "-n", "20", "--json", *flags, home=tmp_path
        )
        found: dict[str, object] = json.loads(done.stdout)
        return found

    free = sampled()
    assert sampled("--seed", str(free["seed"]))["token_ids"] == free["token_ids"]
    assert sampled("--seed", "5")["token_ids"] != sampled("--seed", "6")["token_ids"]


def test_a_stop_text_ends_the_answer_before_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    text = str(answer(tiny_model_dir, tmp_path, "Hello")["text"])
    stop = text[len(text) // 2 :][:3]
    cut = answer(tiny_model_dir, tmp_path, "Hello", "--stop", "@@@", "--stop", stop)
    assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"


@pytest.mark.parametrize("chunk", ["1", "7", "64", "1000"])
def test_any_chunk_gives_the_same_answer(chunk: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    expected = answer(tiny_model_dir, tmp_path, prompt)["token_ids"]
    assert (
        answer(tiny_model_dir, tmp_path, prompt, "--chunk", chunk, "--slack", "16")["token_ids"] == expected
    )


def test_a_reader_that_leaves_ends_the_run_by_sigpipe_without_a_word(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = subprocess.Popen(
        [*MISTRAL, "run", "Hello", "-m", str(tiny_model_dir), "-q", "-t", "2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )
    assert command.stdout is not None and command.stderr is not None
    assert len(command.stdout.read(5)) == 5
    command.stdout.close()
    assert command.wait(60) == -signal.SIGPIPE  # a shell shows 141
    assert command.stderr.read() == b""


def test_a_pipeline_of_the_shell_works(tiny_model_dir: Path, tmp_path: Path) -> None:
    script = f'echo hi | {" ".join(MISTRAL)} run -m "{tiny_model_dir}" -n 50 | head -c 5; echo " ${{PIPESTATUS[1]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=environment(tmp_path), timeout=60)
    assert done.stdout.split()[-1] in (b"0", b"141")
    assert b"Traceback" not in done.stderr and b"\x1b" not in done.stdout + done.stderr


def test_ctrl_c_keeps_what_came_and_ends_by_sigint(tiny_model_dir: Path, tmp_path: Path) -> None:
    command = subprocess.Popen(
        [*MISTRAL, "run", "Hello", "-m", str(tiny_model_dir), "-t", "2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )
    assert command.stdout is not None and command.stderr is not None
    begun = command.stdout.read(3)
    command.send_signal(signal.SIGINT)
    assert len(begun + command.stdout.read()) >= 3
    assert command.wait(60) == -signal.SIGINT  # a shell shows 130
    assert b"Traceback" not in command.stderr.read()


def test_ctrl_c_ends_the_program_also_where_an_import_would_swallow_the_exception(tmp_path: Path) -> None:
    """torch swallows what numpy's import raises, and goes on with half of it."""
    swallow = "import signal\ntry:\n    signal.raise_signal(2)\nexcept KeyboardInterrupt:\n    pass\n"
    (tmp_path / "torch.py").write_text(swallow)
    env = environment(tmp_path)
    done = subprocess.run(
        [*MISTRAL, "run", "Hello", "-m", "x"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=env | {"PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_what_cannot_be_is_refused_before_the_model_is_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    model = ["-m", str(tiny_model_dir)]
    for arguments, part in [
        (["run", *model], "no prompt"),
        (["run", "x", *model, "--top-p", "2"], "top_p is 2.0"),
        (["run", "x", *model, "-t", "nan"], "temperature is nan"),
        (["run", "x", *model, "--chunk", "0"], "--chunk 0"),
        (["run", "x", *model, "--device", "abacus"], "abacus"),
        (["run", "x", *model, "--dtype", "int3"], "int3"),
        (["run", "x", *model, "--ctx", "100000"], "1024"),
        (["run", "x", *model, "--raw", "--system", "y"], "--raw"),
        (["run", *model, "-f", "latin1.txt"], "byte 3"),
        (["run", *model, "-f", "none.txt"], "none.txt"),
        (["run", "x", *model, "--no-such-flag"], "--no-such-flag"),
        (["run", "x", *model, "--stop", "a", "--stop", ""], "--stop is empty"),
        (["run", "caf\udce9", *model], "prompt is not UTF-8"),
        (["run", "x", *model, "--system", "caf\udce9"], "--system is not UTF-8"),
        (["run", "x", *model, "--stop", "caf\udce9"], "--stop is not UTF-8"),
        (["chat", *model, "--system", "caf\udce9"], "--system is not UTF-8"),
        (["nonsense"], "nonsense"),
    ]:
        assert_one_sentence(mistral(*arguments, home=tmp_path), 2, part)
    assert_one_sentence(mistral("run", *model, home=tmp_path, stdin=b"\xff"), 2, "UTF-8")


@pytest.mark.parametrize("command", ["run", "chat"])
def test_an_answer_that_the_first_token_ends_is_said_to_be_empty(
    command: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (first, *_) = answer(tiny_model_dir, tmp_path, stdin="Hello")["token_ids"]  # type: ignore[misc]
    shutil.copytree(tiny_model_dir, tmp_path / "mute")
    (tmp_path / "mute" / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    done = mistral(command, "-m", "./mute", "-t", "0", home=tmp_path, stdin="Hello")
    assert (done.returncode, done.stdout) == (0, "")
    assert "the model's answer is empty" in done.stderr.splitlines()
    quiet = mistral("run", "-q", "-m", "./mute", "-t", "0", home=tmp_path, stdin="Hello")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert "empty" not in mistral(command, "-m", tiny_model_dir, "-n", "2", home=tmp_path, stdin="Hi").stderr


def test_the_built_in_model_answers_a_question_with_sense(tmp_path: Path) -> None:
    done = mistral("run", "What is the capital of France?", "-t", "0", home=tmp_path)
    assert done.returncode == 0 and "Paris" in done.stdout


def test_without_a_name_the_built_in_model_answers_whatever_build_is_called_demo(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "data" / "mistral" / "models" / "demo")
    assert "Paris" in mistral("run", "What is the capital of France?", "-t", "0", home=tmp_path).stdout
    named = mistral("run", "Hello", "-m", "demo", "-t", "0", "-n", "6", "--json", home=tmp_path)
    assert json.loads(named.stdout)["text"] == answer(tiny_model_dir, tmp_path, "Hello")["text"]
