"""A session's KV cache on disk, with the built-in model: found again, never in the way, bounded, of its own session."""

import os
import stat

import pytest
from scripted_chat import ScriptedTerminal, talk

from mistralcli import store as models
from mistralcli.cli.chat import kept_cache, repl
from mistralcli.cli.chat.kept_cache import make_room
from mistralcli.cli.chat.sessions import SessionStore, cache_path
from mistralcli.cli.chat.settings import with_setting
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session

STORY = "Tell me a story about a fox."


class Loaded:
    """The built-in model, which is there at once."""

    name = "demo"

    def __init__(self):
        self._session = open_session(models.resolve_demo(), SessionOptions())

    def ready(self):
        return True

    def session(self):
        return self._session


@pytest.fixture(scope="module")
def demo():
    return Loaded()


@pytest.fixture
def fresh(demo):
    """The model as in a process of its own: with an empty cache."""

    def fresh():
        engine = demo.session().engine
        engine.cache.rewind(0)
        engine.token_ids = []
        return demo

    return fresh


def chat_of(model, directory):
    return Chat(model, ScriptedTerminal(), SessionStore(directory))


def greedy():
    return with_setting(ChatState(), "temperature", 0)


def ended(chat):
    """The chat's end, and what of its messages is in the session."""
    path = chat.store.path
    chat.store.close()
    return path


def last_turn(chat):
    """How many tokens the prompt had, and how many of them were in the cache."""
    chat.terminal.inputs = ["/stats"]
    (line,) = [note for note in chat.terminal.notes if note.startswith("prompt ")]
    words = line.split()
    return int(words[1]), int(words[3])


def test_a_continued_session_finds_its_cache_and_says_what_it_would_have_said(fresh, tmp_path):
    first = chat_of(fresh(), tmp_path)
    talk(first, STORY, state=greedy())
    path = ended(first)
    assert stat.S_IMODE(cache_path(path).stat().st_mode) == 0o600
    again = chat_of(fresh(), tmp_path)
    talk(again, "What happened next?", "/stats", state=again.store.resume(path).state)
    stayed = chat_of(fresh(), tmp_path)
    talk(stayed, STORY, "What happened next?", "/stats", state=greedy())
    assert first.terminal.shown + again.terminal.shown == stayed.terminal.shown
    n_prompt, n_cached = last_turn(again)
    assert n_prompt == last_turn(stayed)[0] and n_cached > n_prompt - 12


def test_without_its_cache_a_continued_session_computes_all_again(fresh, tmp_path):
    first = chat_of(fresh(), tmp_path)
    talk(first, STORY, state=greedy())
    path = ended(first)
    cache_path(path).unlink()
    again = chat_of(fresh(), tmp_path)
    talk(again, "What happened next?", "/stats", state=again.store.resume(path).state)
    assert last_turn(again)[1] == 0


@pytest.mark.parametrize("content", [b"", b"no cache", None])
def test_a_cache_that_cannot_be_used_is_no_error(fresh, tmp_path, content):
    first = chat_of(fresh(), tmp_path)
    talk(first, "/set max_tokens 40", STORY, state=greedy())
    path = ended(first)
    if content is None:
        cache_path(path).unlink()
        cache_path(path).mkdir()
    else:
        cache_path(path).write_bytes(content)
    chat = chat_of(fresh(), tmp_path)
    talk(chat, "/retry", "/stats", state=chat.store.resume(path).state)
    assert last_turn(chat)[1] == 0
    assert not [note for note in chat.terminal.notes if "error" in note]


def test_a_session_that_was_only_looked_at_keeps_the_cache_it_had(fresh, tmp_path):
    first = chat_of(fresh(), tmp_path)
    talk(first, "/set max_tokens 40", STORY, state=greedy())
    kept = cache_path(ended(first))
    os.utime(kept.with_suffix(".jsonl"), (1e9, 1e9))
    before = kept.read_bytes()
    chat = chat_of(fresh(), tmp_path)
    talk(chat, "/set max_tokens 40", "Tell me a story about a boat.", "/load 2", state=greedy())
    assert kept.read_bytes() == before
    assert len(list(tmp_path.glob("*.kv"))) == 2


def test_the_kept_caches_have_a_limit_and_the_oldest_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_cache, "MAX_BYTES", 100)
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / f"{name}.kv").write_bytes(b"x" * 30)
        os.utime(tmp_path / f"{name}.kv", (1e9 - age, 1e9 - age))
    (tmp_path / ".gone.kv.123.partial").write_bytes(b"x")
    os.utime(tmp_path / ".gone.kv.123.partial", (1e9, 1e9))
    (tmp_path / ".now.kv.124.partial").write_bytes(b"x")
    make_room(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".now.kv.124.partial", "middle.kv", "new.kv"]


def test_a_cache_above_the_limit_is_not_kept(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_cache, "MAX_BYTES", 1000)
    chat = chat_of(fresh(), tmp_path)
    talk(chat, "/set max_tokens 40", STORY, state=greedy())
    assert not cache_path(chat.store.path).exists()


def test_a_chat_that_is_told_to_end_keeps_a_cache_that_is_quickly_written(fresh, tmp_path, monkeypatch):
    for most_bytes, is_kept in ((kept_cache.QUICK_BYTES, True), (1000, False)):
        monkeypatch.setattr(repl, "QUICK_BYTES", most_bytes)
        chat = chat_of(fresh(), tmp_path / str(most_bytes))
        with pytest.raises(SystemExit):
            talk(chat, "/set max_tokens 40", STORY, SystemExit(143), state=greedy())
        assert cache_path(chat.store.path).exists() is is_kept


def test_a_continuation_by_the_built_in_model_makes_one_text(fresh, tmp_path):
    chat = chat_of(fresh(), tmp_path)
    talk(chat, STORY, "/set max_tokens 12", "/retry", "/set max_tokens none", "/continue", state=greedy())
    tree = SessionStore(tmp_path).resume(ended(chat)).state.tree
    whole, cut = (node.message.content for node in tree.nodes[1:])
    assert whole.startswith(cut) and len(cut) < len(whole)
    assert tree.at == 1  # the continuation is the whole answer over again, which stands there already
