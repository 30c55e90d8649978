"""The commands that read and write: files with a message, exports, the clipboard, settings, the model."""

import base64
import json

import pytest
from scripted_chat import after, chat_with, said, talk

from mistralcli.cli.chat import clipboard
from mistralcli.cli.chat.attachments import MAX_FILE_BYTES, as_block, read_attachment
from mistralcli.cli.chat.clipboard import copy_text, osc52
from mistralcli.cli.chat.state import Attachment, ChatState
from mistralcli.errors import MistralError


def test_a_file_goes_with_the_next_message_and_its_tokens_are_told(tmp_path):
    (tmp_path / "my notes.txt").write_text("\ufeffone two\n\nthree\n")
    chat = chat_with(["Fine"], ["Again"])
    state = after(chat, f"/file {tmp_path / 'my notes.txt'}")
    assert chat.terminal.notes == ["my notes.txt goes with the next message: 7 tokens of 512 left"]
    state = after(chat, "What is this?", "and?", state=state)
    assert said(state)[0][1] == "my notes.txt:\n```\none two\n\nthree\n```\n\nWhat is this?"
    assert said(state)[2] == ("user", "and?")


def test_a_file_stays_with_a_message_that_was_not_answered(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    chat = chat_with([KeyboardInterrupt()], ["Fine"])
    state = after(chat, f"/file {tmp_path / 'a.txt'}", "What is this?")
    assert (state.draft, len(state.attached)) == ("What is this?", 1)
    assert "one" in said(after(chat, "What?", state=state))[0][1]


def test_files_are_taken_back(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert after(chat_with(), f"/file {tmp_path / 'a.txt'}", "/file none") == ChatState()


def test_a_name_is_one_line_in_the_message(tmp_path):
    (tmp_path / "a\n```b").write_text("one")
    assert read_attachment(tmp_path / "a\n```b") == Attachment("a ```b", "one")


def test_a_fence_in_a_file_does_not_end_its_block():
    assert as_block(Attachment("a.md", "x\n````\ny")) == "a.md:\n`````\nx\n````\ny\n`````"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (b"\x7fELF\0\0", "is not text: it has a zero byte"),
        (b" \n", "is empty"),
        (b"x" * (MAX_FILE_BYTES + 1), "has 4,194,305 bytes, and a message takes files of up to 4,194,304"),
        (b"word " * 600, "has 603 tokens, and the context 512 in all"),
        (None, "there is no file"),
        ("directory", "is a directory"),
    ],
)
def test_what_cannot_go_with_a_message_is_refused_in_one_sentence(tmp_path, content, reason):
    path = tmp_path / "file"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    chat = chat_with()
    assert after(chat, f"/file {path}") == ChatState()
    error = chat.terminal.notes[0].splitlines()[0]
    assert error.startswith("error: ") and str(path) in error and reason in error


def test_an_endless_file_is_refused_unread():
    chat = chat_with()
    after(chat, "/file /dev/zero")
    assert chat.terminal.notes == ["error: there is no file /dev/zero"]


def test_export_writes_the_branch_for_people_and_for_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = chat_with(["not this"], ["Hi"])
    after(chat, "/system Be brief", "Hello", "/retry", "/export md", "/export json out.json")
    (path,) = tmp_path.glob("chat-*.md")
    assert path.read_text() == (
        "# A chat with scripted\n\n## System\n\nBe brief\n\n## User\n\nHello\n\n## Assistant\n\nHi\n"
    )
    assert chat.terminal.notes[-2:] == [f"written to {path.name}", "written to out.json"]
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ],
    }


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("pdf", "writes md or json, not 'pdf'"),
        ("md taken.md", "taken.md exists"),
        ("json no/where", "cannot be written"),
    ],
)
def test_an_export_that_cannot_be_is_refused_and_overwrites_nothing(tmp_path, monkeypatch, argument, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.md").write_text("mine")
    chat = chat_with(["Hi"])
    after(chat, "Hello", f"/export {argument}")
    assert reason in chat.terminal.notes[-1]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_there_is_nothing_to_export_or_copy_before_the_first_answer():
    chat = chat_with()
    after(chat, "/export md", "/copy", "/export")
    assert chat.terminal.notes == [
        "error: there are no messages yet",
        "error: there is no answer yet",
        "error: /export needs md|json [FILE] after it",
    ]


@pytest.fixture
def desktop(tmp_path, monkeypatch):
    """A desktop without programs for the clipboard; gives a function that installs one, which writes to `clip`."""
    for name in ("WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(name, variable, exit_code=0):
        monkeypatch.setenv(variable, "1")
        (tmp_path / name).write_text(f"#!/bin/sh\ncat > '{tmp_path}/clip'\nexit {exit_code}\n")
        (tmp_path / name).chmod(0o755)
        return tmp_path / "clip"

    return install


@pytest.mark.parametrize(("name", "variable"), [("wl-copy", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY")])
def test_copy_takes_the_last_answer_to_the_desktop(desktop, name, variable):
    clip = desktop(name, variable)
    chat = chat_with(["one"], ["Hé\x1b", " \n"])
    after(chat, "1", "2", "/copy")
    assert clip.read_text() == "Hé\x1b "
    assert chat.terminal.notes == [f"copied 4 characters by {name}"]


def test_copy_goes_through_a_terminal_too_and_commands_it_nothing_else(desktop, monkeypatch, capsys):
    monkeypatch.setattr(clipboard.console, "is_smart_terminal", lambda stream: True)
    desktop("wl-copy", "WAYLAND_DISPLAY")
    text = "\x1b]0;title\x07 answer"
    assert copy_text(text) == "copied 17 characters by wl-copy and the terminal, if it takes OSC 52"
    sent = capsys.readouterr().err
    assert sent == f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07" == osc52(text.encode())


def test_a_text_too_long_for_a_terminal_or_without_any_way_is_an_error(desktop, monkeypatch):
    with pytest.raises(MistralError, match="no way to the clipboard for 5 characters"):
        copy_text("short")
    monkeypatch.setattr(clipboard.console, "is_smart_terminal", lambda stream: True)
    with pytest.raises(MistralError, match="no way to the clipboard for 80,000 characters"):
        copy_text("x" * 80_000)


def test_a_program_that_fails_is_no_way(desktop):
    desktop("xclip", "DISPLAY", exit_code=1)
    with pytest.raises(MistralError, match="no way to the clipboard"):
        copy_text("x")


@pytest.mark.parametrize(
    ("typed", "stop"),
    [
        ("User:", ("User:",)),
        ("two words", ("two words",)),
        ('"\\n\\n"', ("\n\n",)),
        ('["a", "b"]', ("a", "b")),
        ("3", ("3",)),
        ("none", ()),
        ("null", ("null",)),
    ],
)
def test_set_stop_takes_a_text_as_it_is_or_as_json(typed, stop):
    chat = chat_with(["x"])
    state = after(chat, f"/set stop {typed}", "Hello")
    assert state.stop == chat.session.stops[0] == stop


@pytest.mark.parametrize("typed", ['""', "[3]", '["a", ""]'])
def test_set_stop_refuses_what_is_no_text(typed):
    chat = chat_with()
    assert after(chat, f"/set stop {typed}") == ChatState()
    assert "error: stop must be texts" in chat.terminal.notes[0]


def test_an_answer_ends_before_a_stop_text():
    chat = chat_with(["one ", "two", " three"])
    state = after(chat, "/set stop tw", "Count")
    assert said(state)[-1] == ("assistant", "one ")
    assert not state.tree.last.unfinished


def test_settings_may_be_written_as_flags():
    assert after(chat_with(), "/set --top-k 5", "/set min-p 0.1").params.top_k == 5


def test_model_shows_what_answers_and_goes_on_with_another():
    chat = chat_with(["a"], others=("better",))
    talk(chat, "/model", "/model better", "/model worse", "one")
    assert chat.terminal.notes[:3] == [
        "scripted on nothing",
        "better on nothing",
        "error: there is no model worse",
    ]
    assert chat.store.latest().model == "better"
