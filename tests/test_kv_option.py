"""`--kv int8`: the flag of run and chat, and the plan that it changes."""

from pathlib import Path

import pytest
import torch
from program import assert_one_sentence, mistral

from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session


@pytest.mark.parametrize("command", [["run", "Hello"], ["chat"]])
def test_an_answer_comes_from_an_int8_cache_too(
    tiny_model_dir: Path, tmp_path: Path, command: list[str]
) -> None:
    done = mistral(
        *command, "-m", tiny_model_dir, "-t", "0", "-n", "6", "--kv", "int8", home=tmp_path, stdin="Hi"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [["run", "Hello"], ["chat"]])
def test_another_type_is_refused_in_one_sentence(
    tiny_model_dir: Path, tmp_path: Path, command: list[str]
) -> None:
    done = mistral(*command, "-m", tiny_model_dir, "--kv", "int4", home=tmp_path, stdin="Hi")
    assert_one_sentence(done, 2, "--kv int4", "int8")


def test_without_the_flag_the_cache_is_of_the_type_that_is_computed_in(tiny_model_dir: Path) -> None:
    plain, in_int8 = (
        open_session(tiny_model_dir, SessionOptions(ctx=256, device="cpu", dtype="bfloat16", kv=kv))
        for kv in (None, "int8")
    )
    assert plain.engine.cache.dtype == torch.bfloat16 and in_int8.engine.cache.dtype == torch.int8
    head_dim = plain.config.head_dim
    assert in_int8.plan.cache_bytes * 2 * head_dim == plain.plan.cache_bytes * (head_dim + 4)
    in_int8.engine.cache.reserve(256)
    assert in_int8.cache_bytes == in_int8.plan.cache_bytes
    assert "kB of int8)" in in_int8.describe() and "int8" not in plain.describe()
