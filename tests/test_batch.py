"""Many completions together: each is what it would be alone, in whatever order they end, and a killed run goes on."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_instruct_checkpoint, token_ids
from program import MISTRAL, assert_one_sentence, environment, mistral

from mistralcli.batch import Answer, Job, complete_all
from mistralcli.errors import ContextOverflowError
from mistralcli.file_lock import try_lock
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import Session, open_session


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session of three sequences; its window is 64, so its rings wrap."""
    directory = tmp_path_factory.mktemp("batch") / "tiny"
    tiny_instruct_checkpoint(directory)
    return open_session(directory, SessionOptions(ctx=256, slack=16, device="cpu", n_seqs=3))


def answers(session: Session, jobs: list[Job]) -> dict[int, Answer]:
    found = list(complete_all(session, jobs))
    assert len(found) == len(jobs)
    return {answer.index: answer for answer in found}


def job(index: int, n_prompt: int, n_answer: int, **changes: Any) -> Job:
    ids = token_ids(n_prompt, vocab_size=32768, seed=index)
    return Job(index, ids, SamplingParams(0.8, seed=index), max_tokens=n_answer, **changes)


def test_every_answer_is_what_it_is_alone_however_the_sequences_are_shared(three: Session) -> None:
    jobs = [job(i, n_prompt=5 + 37 * (i % 4), n_answer=9 + 25 * (i % 3)) for i in range(8)]
    together = answers(three, jobs)
    for one in jobs:
        alone = answers(three, [one])[one.index]
        assert together[one.index].token_ids == alone.token_ids
        assert together[one.index].text == alone.text and alone.finish_reason == "length"


def test_a_sequence_begins_afresh_where_another_has_been(three: Session) -> None:
    engine = three.engine
    before = engine.start({1: token_ids(20, vocab_size=32768, seed=1)})[1]
    engine.start({1: token_ids(150, vocab_size=32768, seed=2)})
    engine.step([5, 6, 7], idle=[0, 2])
    assert torch.equal(engine.start({1: token_ids(20, vocab_size=32768, seed=1)})[1], before)


def test_a_job_that_cannot_be_has_its_error_and_touches_no_other(three: Session) -> None:
    found = answers(three, [job(0, 10, 5), job(1, 300, 5), job(2, 250, 50), job(3, 10, 0)])
    assert isinstance(found[1].error, ContextOverflowError)
    assert len(found[0].token_ids) == 5 and found[3].token_ids == []
    assert len(found[2].token_ids) == 6 and found[2].finish_reason == "length"  # the context is full


LINES = [{"prompt": f"Say {n}", "id": f"line {n}"} for n in range(5)]


def written(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_answers_are_in_order_and_errors_are_lines_of_their_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    lines = [
        *LINES,
        "nonsense\n",
        {"prompt": "two " * 3000},
        {"prompt": "a", "extra": 1},
        {"messages": [{"role": 1}]},
    ]
    source = written(tmp_path / "in.jsonl", [*lines])
    done = mistral(
        "run", "--batch", source, "-o", "out.jsonl", "-j", "3", "-n", "6", "-m", tiny_model_dir, home=tmp_path
    )
    assert_one_sentence(done, 1, "4 of 9 lines have an error")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["index"] for one in found] == list(range(9))
    assert [one["id"] for one in found[:5]] == [line["id"] for line in LINES]
    assert all(one["usage"]["completion_tokens"] == 6 for one in found[:5])
    for one, fact in zip(found[5:], ("no JSON", "leaves no room", "'extra'", "a role"), strict=True):
        assert fact in one["error"]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_killed_run_goes_on_and_gives_what_it_would_have_given(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": f"Say {n}"} for n in range(12)])
    command = [
        "run",
        "--batch",
        str(source),
        "-m",
        str(tiny_model_dir),
        "-n",
        "40",
        "-j",
        "2",
        "--kv",
        "float32",
    ]
    whole = mistral(*command, "-o", "whole.jsonl", home=tmp_path)
    assert whole.returncode == 0, whole.stderr
    partial = tmp_path / "out.jsonl.partial"
    running = subprocess.Popen(
        [*MISTRAL, *command, "-o", "out.jsonl"],
        env=environment(tmp_path),
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    n_kept = partial.read_bytes().count(b"\n")
    with partial.open("ab") as file:
        file.write(b'{"digest": "torn')
    again = mistral(*command, "-o", "out.jsonl", home=tmp_path)
    assert again.returncode == 0 and f"{n_kept} of 12 lines are answered" in again.stderr
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (["--batch", "in.jsonl"], "name it with -o"),
        (["--batch", "in.jsonl", "-o", "in.jsonl"], "exists already"),
        (["--batch", "missing.jsonl", "-o", "out.jsonl"], "missing.jsonl cannot be read"),
        (["--batch", "in.jsonl", "-o", "out.jsonl", "Hi"], "--batch and a prompt"),
        (["Hi", "-o", "out.jsonl"], "-o is for --batch"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, flags: list[str], fact: str) -> None:
    written(tmp_path / "in.jsonl", [*LINES])
    assert_one_sentence(mistral("run", *flags, home=tmp_path), 2, fact)


def test_a_second_run_into_the_same_output_is_refused_while_one_goes_on(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = written(tmp_path / "in.jsonl", [*LINES])
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a") as file:
        assert try_lock(file.fileno())
        done = mistral(
            "run", "--batch", source, "-o", "out.jsonl", "-n", "2", "-m", tiny_model_dir, home=tmp_path
        )
    assert_one_sentence(done, 2, "another run is writing out.jsonl.partial")
    assert not (tmp_path / "out.jsonl").exists() and partial.read_bytes() == b""
