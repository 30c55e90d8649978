"""`mistral show` tells the shape, and a cache size that is the process's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from big_model import MISTRAL_7B, write_sparse_checkpoint
from program import assert_one_sentence, mistral

from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session

FULL_CACHE = 2 * 32 * 8 * 128 * 2 * 32768


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7B-shaped models whose files take no room: with a window and without."""
    path = tmp_path_factory.mktemp("home")
    write_sparse_checkpoint(path / "windowed", MISTRAL_7B)
    write_sparse_checkpoint(path / "full", MISTRAL_7B | {"sliding_window": None})
    return path


def memory(home: Path, model: str, *flags: str) -> dict[str, Any]:
    done = mistral("show", model, "--json", "--ctx", "32768", *flags, home=home)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["memory"]
    return found


def test_a_window_takes_seven_times_less_cache_whatever_the_chunk_and_eight_with_slack_one(
    home: Path,
) -> None:
    assert memory(home, "./full")["cache_bytes"] == FULL_CACHE
    for chunk in ("1", "512", "4096", "32768"):
        assert FULL_CACHE / memory(home, "./windowed", "--chunk", chunk)["cache_bytes"] >= 7
    assert FULL_CACHE / memory(home, "./windowed", "--slack", "1")["cache_bytes"] == 8


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("slack", [1, 512])
def test_show_and_the_process_agree_on_the_cache(
    chunk: int, slack: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    flags = ["--ctx", "1024", "--slack", str(slack), "--chunk", str(chunk)]
    shown = json.loads(mistral("show", tiny_model_dir, "--json", *flags, home=tmp_path).stdout)
    session = open_session(tiny_model_dir, SessionOptions(ctx=1024, slack=slack, chunk=chunk))
    session.engine.prefill([[5] * 1023])
    session.engine.step([5])
    assert session.engine.cache.size_bytes == shown["memory"]["cache_bytes"]


def test_the_text_names_what_a_user_asks_for(home: Path) -> None:
    text = mistral("show", "./windowed", home=home).stdout
    for part in (
        "n_layers",
        "32",
        "sliding_windows",
        "4096",
        "14.5 GB",
        "model.safetensors",
        "cache",
        "fits here",
    ):
        assert part in text
    assert "\x1b" not in text


def test_a_damaged_card_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    (tmp_path / "damaged" / "quantization_card.json").write_text("{")
    assert_one_sentence(mistral("show", "./damaged", home=tmp_path), 9, "quantization_card.json")


def test_a_context_beyond_the_models_own_is_refused(home: Path) -> None:
    assert_one_sentence(mistral("show", "./full", "--ctx", "40000", home=home), 2, "40000", "32768")
