"""Saved chats: they come back as they were, and no file can do harm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_chat import after, chat_with, said

from mistralcli.cli.chat.file import load_chat, save_chat
from mistralcli.cli.chat.settings import settings_of
from mistralcli.cli.chat.state import Attachment, ChatState
from mistralcli.conversation import Message
from mistralcli.errors import DiskError, IntegrityError, MistralError, UsageError
from mistralcli.run_options import SamplingParams


def saved_chat():
    state = ChatState(
        system="Be brief", params=SamplingParams(0.5, 0.9, 40, 0.1, 1.2, 3), max_tokens=99, stop=("\n",)
    )
    state = state.with_message("Hé [/INST]\x1b").with_answer("o", unfinished=True)
    state = replace(state, tree=state.tree.back()).with_answer("ok\n", unfinished=False)
    state = state.with_message("and?").with_answer("no", unfinished=False)
    return replace(state, dropped=frozenset({0}), attached=(Attachment("a.txt", "text"),))


def chat_of(*texts, **options):
    state = ChatState(**options)
    for n, text in enumerate(texts):
        state = state.with_answer(text, unfinished=False) if n % 2 else state.with_message(text)
    return state


def test_save_and_load_bring_the_chat_back(tmp_path):
    save_chat(tmp_path / "chat.json", "some/model", saved_chat())
    assert load_chat(tmp_path / "chat.json") == ("some/model", saved_chat())


def test_the_commands_save_and_load_name_the_other_model(tmp_path):
    chat = chat_with(["Hi"])
    state = after(chat, "Hello", f"/save {tmp_path / 'my chat.json'}")
    other = chat_with()
    other.model.name = "other"
    loaded = after(other, f"/load {tmp_path / 'my chat.json'}")
    assert loaded.conversation == state.conversation
    assert other.terminal.notes == [
        "it was held with scripted, and goes on with other",
        "loaded 2 messages, the last: Hi",
    ]


def test_a_loaded_chat_that_ends_with_a_question_is_answered(tmp_path):
    save_chat(tmp_path / "chat.json", "scripted", chat_of("Hello"))
    state = after(chat_with(["Hi"]), f"/load {tmp_path / 'chat.json'}")
    assert said(state) == [("user", "Hello"), ("assistant", "Hi")]


def test_a_saved_chat_is_for_its_owner_alone_also_when_the_file_was_not(tmp_path):
    path = tmp_path / "chat.json"
    save_chat(path, "m", ChatState())
    path.chmod(0o644)
    save_chat(path, "m", saved_chat())
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_save_overwrites_no_file_that_is_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt exists and is not a saved chat"):
        save_chat(tmp_path / "thesis.txt", "m", saved_chat())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    save_chat(path, "m", saved_chat())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        save_chat(path, "m", ChatState())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_save_into_a_missing_directory_says_so(tmp_path):
    with pytest.raises(DiskError, match="No such file or directory"):
        save_chat(tmp_path / "missing" / "chat.json", "m", saved_chat())


@pytest.mark.parametrize("command", ["/save", "/load"])
@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused_and_changes_nothing(command, name):
    chat = chat_with()
    assert after(chat, f"{command} {name}") == ChatState()
    assert chat.terminal.notes[0].startswith("error: ") and name in chat.terminal.notes[0]


FIRST = {
    "format": "mistral-chat",
    "version": 1,
    "model": "m",
    "system": None,
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "settings": {name: value for name, value in settings_of(ChatState()).items() if name != "stop"},
}
GOOD = FIRST | {
    "version": 2,
    "messages": [
        {"parent": None, "role": "user", "content": "a"},
        {"parent": 0, "role": "assistant", "content": "b", "unfinished": True},
        {"parent": 0, "role": "assistant", "content": "c"},
    ],
    "at": 1,
    "dropped": [],
    "settings": settings_of(ChatState()),
}


@pytest.mark.parametrize("saved", [FIRST, GOOD])
def test_the_files_that_the_hostile_ones_are_made_from_load(tmp_path, saved):
    (tmp_path / "chat.json").write_text(json.dumps(saved))
    assert load_chat(tmp_path / "chat.json")[1].conversation.messages == (
        Message("user", "a"),
        Message("assistant", "b"),
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        b"1" * 10_000,
        json.dumps([GOOD]).encode(),
        *(
            json.dumps(GOOD | change).encode()
            for change in (
                {"messages": FIRST["messages"]},
                {"messages": [{"parent": 0, "role": "user", "content": "a"}]},
                {"messages": [{"parent": True, "role": "user", "content": "a"}]},
                {"at": 3},
                {"at": -1},
                {"at": "1"},
                {"dropped": None},
                {"dropped": [3]},
                {"attached": None},
                {"attached": ["a.txt"]},
                {"attached": [{"name": "a.txt"}]},
                {"settings": GOOD["settings"] | {"stop": "x"}},
                {"settings": GOOD["settings"] | {"stop": [""]}},
                {"settings": GOOD["settings"] | {"stop": ["\ud800"]}},
            )
        ),
        *(
            json.dumps(FIRST | change).encode()
            for change in (
                {"format": "other"},
                {"version": 3},
                {"model": None},
                {"system": 3},
                {"system": "\ud800"},
                {"messages": None},
                {"messages": [3]},
                {"messages": [{"role": "assistant", "content": "b"}]},
                {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]},
                {"messages": [{"role": "user", "content": "a\ud800"}]},
                {"messages": [{"role": "user", "content": ["a"]}]},
                {"messages": [{"role": "user", "content": ""}]},
                {"settings": None},
                {"settings": {}},
                {"settings": FIRST["settings"] | {"extra": 1}},
                {"settings": FIRST["settings"] | {"temperature": "1"}},
                {"settings": FIRST["settings"] | {"temperature": float("nan")}},
                {"settings": FIRST["settings"] | {"temperature": 10**400}},
                {"settings": FIRST["settings"] | {"top_k": True}},
                {"settings": FIRST["settings"] | {"top_k": [1]}},
            )
        ),
    ],
)
def test_a_broken_file_gives_one_sentence_and_changes_nothing(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"^\S+chat\.json (is not|has)") as error:
        load_chat(path)
    assert "\n" not in error.value.message
    before = ChatState(system="kept")
    assert after(chat_with(), f"/load {path}", state=before) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(good=st.sampled_from([FIRST, GOOD]), key=st.sampled_from(sorted(GOOD)), value=JSON)
def test_any_json_in_any_place_loads_or_is_refused(tmp_path_factory, good, key, value):
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    path.write_text(json.dumps(good | {key: value}))
    try:
        load_chat(path)
    except MistralError as error:
        assert error.message.startswith(str(path))


@pytest.mark.parametrize("name", ["missing.json", "directory"])
def test_what_is_no_file_cannot_be_loaded(tmp_path, name):
    (tmp_path / "directory").mkdir()
    with pytest.raises(UsageError, match="there is no file"):
        load_chat(tmp_path / name)


def test_an_endless_or_huge_file_is_refused_unread(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        load_chat(Path("/dev/zero"))
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(IntegrityError, match="64 MiB"):
        load_chat(tmp_path / "huge.json")
