"""Sessions: saved as they go, readable after any end, and no chat's business but their own."""

import json
import os
import stat
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_chat import after, chat_with, continued, said, talk

from mistralcli.cli.chat.file import load_chat
from mistralcli.cli.chat.sessions import SessionStore
from mistralcli.cli.chat.settings import settings_of
from mistralcli.cli.chat.state import ChatState
from mistralcli.errors import MistralError


def events(chat):
    return [json.loads(line) for line in chat.store.path.read_text().splitlines()]


def test_a_session_comes_back_as_it_was():
    chat = chat_with(["a"], ["b"], ["c"], ["d"])
    talk(chat, "/system Be brief", "one", "/set top_k 5", "/retry", "two", "/drop 1", '/set stop ["x", "y"]')
    _, resumed = continued(chat)
    state = resumed.state
    assert said(state) == [("system", "Be brief"), ("user", "two"), ("assistant", "c")]
    assert [node.message.content for node in state.tree.nodes] == ["one", "a", "b", "two", "c"]
    assert settings_of(state) == settings_of(ChatState()) | {"top_k": 5, "stop": ["x", "y"]}
    assert (resumed.model, resumed.notes) == ("scripted", ())


def test_a_file_that_was_not_sent_yet_is_still_there_after_the_end(tmp_path):
    (tmp_path / "a b.txt").write_text("one")
    chat = chat_with()
    talk(chat, f"/file {tmp_path / 'a b.txt'}")
    other, resumed = continued(chat, ["Fine"])
    talk(other, "What is this?", state=resumed.state)
    assert other.terminal.notes[0] == "a b.txt goes with the next message"
    assert other.terminal.toolbars[0].endswith(" · a b.txt goes with the next message")
    _, resumed = continued(other)
    assert said(resumed.state)[0] == ("user", "a b.txt:\n```\none\n```\n\nWhat is this?")
    assert not resumed.state.attached


def test_a_chat_in_which_nothing_was_said_leaves_nothing_behind():
    chat = chat_with()
    talk(chat, "/system Be brief", "/set top_k 5", "/help")
    assert list(chat.store.directory.iterdir()) == []
    assert chat.store.latest() is None


def test_a_session_is_for_its_owner_alone(tmp_path):
    chat = chat_with(["a"], directory=tmp_path / "data" / "sessions")
    talk(chat, "one")
    assert stat.S_IMODE(chat.store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(chat.store.directory.stat().st_mode) == 0o700


def test_the_turn_is_in_the_file_from_the_first_piece_on_and_pieces_once_a_second():
    chat = chat_with(["Once", " upon", " a", " time"])
    now = [0.0]
    chat.store._clock = lambda: now[0]
    seen = []

    def write(text):
        seen.append(events(chat))
        now[0] += 0.6

    chat.terminal.write = write
    talk(chat, "Tell")
    assert [event["event"] for event in seen[0]] == ["session", "draft"]
    assert [(e["event"], e.get("text", e.get("content"))) for e in seen[-1]][2:] == [
        ("message", "Tell"),
        ("draft", ""),
        ("piece", "Once"),
        ("piece", " upon a"),
    ]
    assert seen[2][-1]["text"] == "Once"


def killed_while(chat, path):
    """What the file was when the process was killed."""
    kept = []

    def write(text):
        kept.append(chat.store.path.read_bytes())

    chat.terminal.write = write
    return kept


def test_a_kill_in_the_midst_of_an_answer_keeps_what_was_written_of_it(tmp_path):
    chat = chat_with(["Once", " upon", " a"], [" time"])
    chat.store._clock = iter(range(0, 1000, 5)).__next__
    kept = killed_while(chat, tmp_path)
    talk(chat, "Tell")
    (tmp_path / "killed.jsonl").write_bytes(kept[-1])
    other = chat_with([" time"], directory=tmp_path)
    resumed = other.store.resume(tmp_path / "killed.jsonl")
    assert said(resumed.state) == [("user", "Tell"), ("assistant", "Once upon")]
    assert "/continue" in resumed.notes[0]
    assert said(after(other, "/continue", state=resumed.state))[-1] == ("assistant", "Once upon time")


def test_a_kill_in_the_midst_of_a_continuation_keeps_what_came_of_that(tmp_path):
    chat = chat_with(["Once", KeyboardInterrupt()], [" upon", " a", " time"])
    chat.store._clock = iter(range(0, 1000, 5)).__next__
    talk(chat, "Tell")
    state = chat.store._writing.state
    kept = killed_while(chat, tmp_path)
    talk(chat, "/continue", state=state)
    (tmp_path / "killed.jsonl").write_bytes(kept[-1])
    resumed = SessionStore(tmp_path).resume(tmp_path / "killed.jsonl")
    assert said(resumed.state) == [("user", "Tell"), ("assistant", "Once upon a")]


def test_a_message_without_any_answer_is_the_draft_again(tmp_path):
    chat = chat_with(["a"], [SystemExit(143)])
    with pytest.raises(SystemExit):
        talk(chat, "one", "//two")
    _, resumed = continued(chat)
    assert (said(resumed.state), resumed.state.draft) == ([("user", "one"), ("assistant", "a")], "//two")


@pytest.fixture(scope="module")
def long_session():
    chat = chat_with(["Hé", " là"], ["b"], ["c", KeyboardInterrupt()], ["d"])
    talk(chat, "/system ß", "one", "two", "/retry", "/continue", "/undo", "/set seed 3", "/branch 2")
    return chat.store.path.read_bytes()


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_file_that_is_torn_anywhere_goes_on_and_loses_the_torn_line_alone(
    data, long_session, tmp_path_factory
):
    n_bytes = data.draw(st.integers(0, len(long_session)))
    directory = tmp_path_factory.mktemp("torn")
    path = directory / "torn.jsonl"
    path.write_bytes(long_session[:n_bytes])
    n_whole = long_session[:n_bytes].count(b"\n")
    chat = chat_with(["fine"], directory=directory)
    if not n_whole:
        with pytest.raises(MistralError):
            chat.store.resume(path)
        return
    state = chat.store.resume(path).state
    talk(chat, "and now?", state=state)
    assert path.read_bytes().splitlines()[:n_whole] == long_session.splitlines()[:n_whole]
    other, resumed = continued(chat)
    assert said(resumed.state)[-2:] == [("user", "and now?"), ("assistant", "fine")]
    assert len(other.store.listing(9)) == 1


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_file_with_any_damage_is_refused_or_goes_on_in_a_copy_and_stays_as_it_is(
    data, long_session, tmp_path_factory
):
    at = data.draw(st.integers(0, len(long_session) - 1))
    damaged = bytearray(long_session)
    damaged[at : at + data.draw(st.integers(1, 40))] = data.draw(st.binary(max_size=40))
    directory = tmp_path_factory.mktemp("damaged")
    path = directory / "damaged.jsonl"
    path.write_bytes(damaged)
    chat = chat_with(["fine"], directory=directory)
    try:
        resumed = chat.store.resume(path)
    except MistralError as error:
        assert str(path) in error.message and "\n" not in error.message
        return
    talk(chat, "and now?", state=resumed.state)
    if resumed.notes and "damaged" in resumed.notes[0]:
        assert path.read_bytes() == damaged and chat.store.path != path


def test_a_second_chat_in_the_same_session_goes_on_in_a_copy(tmp_path):
    one = chat_with(["a"], ["mine"], directory=tmp_path)
    talk(one, "Hello")
    first = one.store._writing.state
    two = chat_with(["theirs"], directory=tmp_path)
    resumed = two.store.resume(two.store.latest().path)
    assert "copy" in resumed.notes[0]
    talk(two, "second chat", state=resumed.state)
    talk(one, "first chat", state=first)
    paths = [chat.store.path for chat in (one, two)]
    one.store.close()
    two.store.close()
    ends = [said(SessionStore(tmp_path).resume(path).state) for path in paths]
    assert [[text for _, text in end] for end in ends] == [
        ["Hello", "a", "first chat", "mine"],
        ["Hello", "a", "second chat", "theirs"],
    ]


def test_a_full_disk_is_said_and_the_next_step_saves_it_all(monkeypatch):
    from mistralcli.cli.chat import sessions

    chat = chat_with(["a"], ["b"], ["c"])
    talk(chat, "one")
    state = chat.store._writing.state
    write = sessions.os.pwrite

    def full(descriptor, data, at):
        write(descriptor, data[:7], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions.os, "pwrite", full)
    chat.terminal.notes = []
    chat.store._clock = iter(range(0, 1000, 5)).__next__  # every piece is due
    state = after(chat, "two", state=state)
    assert "No space left" in chat.terminal.notes[0]
    assert len(chat.terminal.notes) == 1 and said(state)[-1] == ("assistant", "b")
    monkeypatch.undo()
    talk(chat, "three", state=state)
    assert [text for _, text in said(continued(chat)[1].state)] == ["one", "a", "two", "b", "three", "c"]


@pytest.mark.parametrize("leaving", ["/exit", KeyboardInterrupt(), SystemExit(143)])
def test_a_chat_that_cannot_be_saved_in_its_place_is_saved_elsewhere_when_it_ends(
    tmp_path, monkeypatch, leaving
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "taken").write_text("a file where the directory is to be")
    chat = chat_with(["a"], ["b"], directory=tmp_path / "taken" / "sessions")
    with suppress(KeyboardInterrupt, SystemExit):
        talk(chat, "one", "two", leaving)
    failed, saved = chat.terminal.notes
    assert "Not a directory\nhint: see who may write there, " in failed
    path = next((tmp_path / "state" / "mistral").glob("rescued-*.json"))
    assert saved == f"the conversation is saved: /load {path} goes on with it"
    assert [text for _, text in said(load_chat(path)[1])] == ["one", "a", "two", "b"]


def test_sessions_are_listed_newest_first_and_load_takes_their_numbers(tmp_path):
    old = chat_with(["a"], directory=tmp_path)
    talk(old, "How old\nare you?")
    old.store.close()
    os.utime(next(tmp_path.iterdir()), (1e9, 1e9))
    chat = chat_with(["b"], ["c"], directory=tmp_path)
    talk(chat, "And you?", "/sessions", "/load 2", "/sessions")
    first, second = chat.terminal.notes[:2]
    assert first.startswith("*  1  ") and "2 messages  scripted  And you?" in first
    assert second.startswith("   2  ") and "2 messages  scripted  How old are you?" in second
    assert chat.terminal.notes[2] == "loaded 2 messages, the last: a"
    assert chat.terminal.notes[-1].startswith("*  2 ")
    assert chat.session.asked[-1].messages[-1].content == "And you?"


@pytest.mark.parametrize("argument", ["0", "2", "99999999999999999999"])
def test_a_number_of_no_session_is_refused(argument):
    chat = chat_with(["a"])
    before = after(chat, "one")
    chat.store.record(before, "scripted")
    assert after(chat, f"/load {argument}", state=before) == before
    assert f"there is no session {argument}" in chat.terminal.notes[-1]


def test_the_session_that_one_is_in_cannot_be_loaded():
    chat = chat_with(["a"])
    talk(chat, "one", "/load 1")
    assert "the session that you are in" in chat.terminal.notes[-1]


def test_a_loaded_file_begins_a_session_of_its_own(tmp_path):
    chat = chat_with(["a"], ["b"], directory=tmp_path / "sessions")
    talk(chat, "one", f"/save {tmp_path / 'chat.json'}", "/clear", f"/load {tmp_path / 'chat.json'}")
    first = chat.store.path
    assert len(chat.store.listing(9)) == 1  # it is as the session is, so it goes on in it
    other = chat_with(["b"], directory=tmp_path / "sessions")
    talk(other, "else", f"/load {tmp_path / 'chat.json'}")
    assert first.exists() and len(other.store.listing(9)) == 3


def test_another_model_is_in_the_session_from_its_answer_on():
    chat = chat_with(["a"], ["b"], others=("better",))
    talk(chat, "one", "/model worse", "/model better", "/retry")
    assert "there is no model worse" in chat.terminal.notes[0]
    other, resumed = continued(chat)
    assert resumed.model == "better"
    assert other.store.listing(1)[0].model == "better"


def test_what_is_no_session_is_neither_listed_nor_resumed(tmp_path):
    for name, content in (("a", b""), ("b", b"[]\n"), ("c", b'{"event": "session", "version": 9}\n')):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    store = SessionStore(tmp_path)
    assert store.listing(9) == []
    for path in tmp_path.iterdir():
        with pytest.raises(MistralError, match=r"no session that this version can read|is damaged"):
            store.resume(path)
