"""--memory-limit is refused before loading when the plan exceeds it, and the plan bounds what is taken."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import MISTRAL_7B, tiny_instruct_checkpoint
from program import assert_one_sentence, mistral

from mistralcli import device, session
from mistralcli.config import read_config
from mistralcli.demo import demo_directory
from mistralcli.plan import Demand, plan_memory, requested_plan
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session
from mistralcli.units import parse_size

WEIGHTS_7B = 4_003_999_248
"""int4 in groups of 128, the head int8, the embedding bfloat16."""


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on CUDA by its kernel, as where Triton is; here it must not be imported for a plan."""
    from mistralcli.ops import attention

    monkeypatch.setitem(attention._loaded, "cuda", lambda *arguments: torch.empty(0))


def test_a_windowed_7b_with_32k_of_context_is_planned_below_6_gb_on_a_gpu(flash: None) -> None:
    demand = Demand(WEIGHTS_7B, torch.bfloat16, 2048, 512, "cuda", 62_000_000)
    plan = plan_memory(MISTRAL_7B, demand, 32768, 80 * 10**9)
    assert plan.total_bytes + device.OUTSIDE_TORCH_BYTES <= parse_size("6GB")
    assert plan.total_bytes > 4.29 * 2**30  # what was allocated at the peak on an H100


def test_flash_attention_needs_no_masks_and_the_reference_all_scores(
    flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand = Demand(0, torch.bfloat16, 2048, 512, "cuda")
    flash_bytes = plan_memory(MISTRAL_7B, demand, 32768, 0).workspace_bytes
    from mistralcli.ops import attention

    monkeypatch.setitem(attention._loaded, "cuda", attention.reference)
    scores = 4 * 32 * 512 * (4096 + 512 - 1)
    assert plan_memory(MISTRAL_7B, demand, 32768, 0).workspace_bytes > flash_bytes + 2 * scores


def test_the_limit_leaves_what_cuda_takes_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(device, "free_memory_bytes", lambda device: 80 * 10**9)
    monkeypatch.setattr(device, "process_bytes", lambda device: None)
    assert device.room_bytes(gpu, None) == 80 * 10**9
    assert device.room_bytes(gpu, 6 * 10**9) == 6 * 10**9 - device.OUTSIDE_TORCH_BYTES
    assert device.room_bytes(gpu, 1) == 0
    monkeypatch.setattr(device, "process_bytes", lambda device: 10**9)  # a driver with a larger context
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10**8)
    assert device.room_bytes(gpu, 6 * 10**9) == 6 * 10**9 - 9 * 10**8


def test_a_context_beyond_the_limit_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    tiny_instruct_checkpoint(tmp_path)
    config = read_config(tmp_path)
    config = replace(config, max_seq_len=4096, sliding_windows=(None,) * config.n_layers)
    demand = Demand(0, torch.float32, 16)
    limit = plan_memory(config, demand, 1024, 0).total_bytes
    with pytest.raises(Exception, match=r"within the limit of 1 GB") as caught:
        requested_plan(config, demand, 2048, limit, "within the limit of 1 GB")
    assert re.search(r"--ctx 1024 would fit", str(caught.value.hint))  # type: ignore[attr-defined]


def test_it_is_refused_before_anything_is_loaded(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load_model", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(session.NotEnoughMemoryError):
        open_session(tiny_model_dir, SessionOptions(device="cpu", memory_limit=1_000_000))


def test_without_ctx_the_longest_context_within_the_limit_is_taken_and_said() -> None:
    """The demo's context is 2,048 positions, and its cache grows with it up to its window alone: so a chunk counts."""
    config = read_config(demo_directory())
    notes: list[str] = []
    free = open_session(demo_directory(), SessionOptions(device="cpu", slack=2048, chunk=2048))
    assert free.max_seq_len == 2048
    demand = Demand(free.plan.weights_bytes, torch.float32, 2048, 2048)
    limit = plan_memory(config, demand, 1024, 0).total_bytes
    options = SessionOptions(device="cpu", memory_limit=limit, slack=2048, chunk=2048)
    limited = open_session(demo_directory(), options, on_note=notes.append)
    assert limited.max_seq_len == 1024 and limited.plan.total_bytes <= limit
    assert any("shortened to 1024" in note and "within the limit of" in note for note in notes)
    assert any("nothing enforces it" in note for note in notes)


@pytest.mark.parametrize("command", ["run", "chat", "bench"])
def test_the_commands_refuse_with_exit_code_7(command: str, tmp_path: Path) -> None:
    done = mistral(command, "--device", "cpu", "--memory-limit", "20MB", home=tmp_path, stdin="hello")
    assert_one_sentence(done, 7, "of 20.0 MB within the limit of 20.0 MB", "raise the limit")


def test_a_size_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    assert_one_sentence(mistral("run", "hello", "--memory-limit", "six", home=tmp_path), 2, "'six'", "6GB")


def test_an_answer_within_the_limit_is_given(tmp_path: Path) -> None:
    done = mistral("run", "hello", "-n", "2", "--device", "cpu", "--memory-limit", "6GB", home=tmp_path)
    assert done.returncode == 0 and done.stdout


def test_a_process_that_the_driver_counts_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "taken_bytes", lambda device: 7 * 10**9)
    check: Callable[[torch.device, int | None], None] = session._check_limit
    check(torch.device("cuda"), None)
    check(torch.device("cuda"), 7 * 10**9)
    with pytest.raises(session.NotEnoughMemoryError, match=r"takes 7\.00 GB .* is 6\.00 GB"):
        check(torch.device("cuda"), 6 * 10**9)
