"""A cache in a file: what it holds goes on exactly as it would have, and is never used with what it is not of."""

import json
import stat
from pathlib import Path

import pytest
import torch
from models import load, random_checkpoint, token_ids
from program import assert_one_sentence, mistral

from mistralcli.engine import Engine
from mistralcli.errors import IntegrityError, UsageError
from mistralcli.model import Transformer
from mistralcli.saved_cache import load_cache, model_digest, save_cache, saved_ids

IDS = token_ids(150)
AFTER = [*IDS, *token_ids(9, seed=2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, str]:
    """A model with a window of 32, so that its ring of 47 slots has wrapped; and its digest."""
    directory = tmp_path_factory.mktemp("windowed")
    random_checkpoint(directory, sliding_window=32)
    return load(directory), model_digest(directory)


def engine(model: Transformer, slack: int = 16, dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(model, max_seq_len=256, chunk=64, slack=slack, cache_dtype=dtype)


def next_ids(one: Engine) -> list[int]:
    return list(one.generate(AFTER, lambda logits, ids: int(logits.argmax()), max_tokens=20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_restored_cache_goes_on_as_the_one_that_was_saved(
    model: tuple[Transformer, str], tmp_path: Path, dtype: torch.dtype
) -> None:
    first, second = engine(model[0], dtype=dtype), engine(model[0], dtype=dtype)
    first.fill(IDS)
    save_cache(tmp_path / "kv", first, model[1])
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o600
    load_cache(tmp_path / "kv", second, model[1], AFTER)
    assert second.n_reusable(AFTER) == len(IDS)
    assert next_ids(second) == next_ids(first)


def test_a_cache_that_was_rewound_before_it_was_saved_keeps_no_more_than_it_had(
    model: tuple[Transformer, str], tmp_path: Path
) -> None:
    """In a ring of 47 slots position 199 has taken the slot of 152, which 184 would have to see."""
    first, second = engine(model[0]), engine(model[0])
    long = [*IDS, *IDS, *IDS][:200]
    first.fill(long)
    first.fill([*long[:190], *AFTER[-2:]])
    save_cache(tmp_path / "kv", first, model[1])
    load_cache(tmp_path / "kv", second, model[1], saved_ids(tmp_path / "kv", model[1]))
    reusable = [(first.n_reusable(long[:n]), second.n_reusable(long[:n])) for n in range(2, 192)]
    assert all(mine == theirs for mine, theirs in reusable)
    assert reusable[180] == (0, 0) and reusable[-1] == (190, 190)


def test_it_is_refused_for_another_model_another_text_and_another_kind_of_cache(
    model: tuple[Transformer, str], tmp_path: Path
) -> None:
    path, saved = tmp_path / "kv", engine(model[0])
    saved.fill(IDS)
    save_cache(path, saved, model[1])
    with pytest.raises(UsageError, match="another model"):
        load_cache(path, engine(model[0]), "0" * 64, AFTER)
    with pytest.raises(UsageError, match="another text"):
        load_cache(path, engine(model[0]), model[1], AFTER[1:])
    for other in (engine(model[0], slack=8), engine(model[0], dtype=torch.float16)):
        with pytest.raises(UsageError, match="cache of another kind"):
            load_cache(path, other, model[1], AFTER)
        assert next_ids(other) == next_ids(engine(model[0], other.cache.slack, other.cache.dtype))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="is no saved cache"):
        load_cache(path, engine(model[0]), model[1], AFTER)


def test_a_second_run_finds_the_system_prompt_computed(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("one two three " * 60)
    flags = ("-m", tiny_model_dir, "--prefix-cache", "kv", "-t", "0", "-n", "8", "--json")
    runs = [
        mistral("run", text, *flags, "--system-file", "system.txt", home=tmp_path)
        for text in ("Hi", "Hi", "So?")
    ]
    assert all(done.returncode == 0 for done in runs), runs[-1].stderr
    found = [json.loads(done.stdout) for done in runs]
    assert found[0]["token_ids"] == found[1]["token_ids"] and found[2]["usage"]["prompt_tokens"] > 180
    assert_one_sentence(mistral("run", "Hi", *flags, home=tmp_path), 2, "kv is of another text")
    (tmp_path / "kv").unlink()
    assert_one_sentence(mistral("run", "Hi", *flags, home=tmp_path), 2, "give --system-file")
