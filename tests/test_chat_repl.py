"""The chat's loop and commands, with a scripted model and user."""

import signal
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_chat import after, chat_with, continued, said, talk

from mistralcli.cli.chat.commands import COMMANDS
from mistralcli.cli.chat.file import load_chat
from mistralcli.cli.chat.inputs import as_input, is_open, message_in
from mistralcli.cli.chat.repl import run_repl
from mistralcli.cli.chat.settings import SETTINGS, settings_of, with_setting
from mistralcli.cli.chat.state import ChatState
from mistralcli.errors import ContextOverflowError, MistralError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "hello"),
        ("  indented\nlines\n", "  indented\nlines"),
        ("/help", None),
        ("  /help", None),
        ("//etc/passwd is a file", "/etc/passwd is a file"),
        ('"""one line"""', "one line"),
        ('"""\n/etc is\n  no command\n"""\n', "/etc is\n  no command"),
        ('say """this"""', 'say """this"""'),
    ],
)
def test_an_input_is_a_message_or_a_command(text, message):
    assert message_in(text) == message


@given(st.text(alphabet='/"a \n', min_size=1).filter(str.strip))
def test_a_message_that_is_typed_again_is_the_same(message):
    assert message_in(as_input(message)).strip("\n") == message.strip("\n")


@pytest.mark.parametrize(
    ("text", "open_"),
    [
        ("hello", False),
        ('"""', True),
        ('"""a\nb', True),
        ('""""', True),
        ('"""a"""', False),
        ('""""""', False),
        ('"""a\n"""  ', False),
        ('a """b', False),
    ],
)
def test_an_input_stays_open_from_three_quotes_to_three_quotes(text, open_):
    assert is_open(text) == open_


def test_a_turn_shows_the_answer_and_keeps_both_messages():
    chat = chat_with(["Hi", " there"], ["Fine\n"])
    state = after(chat, "Hello", "How are you?")
    assert said(state) == [
        ("user", "Hello"),
        ("assistant", "Hi there"),
        ("user", "How are you?"),
        ("assistant", "Fine\n"),
    ]
    assert chat.terminal.shown == "Hi there\nFine\n"


def test_the_repl_ends_at_the_end_of_input_and_at_exit():
    chat = chat_with(["Hi"])
    chat.terminal.inputs = ["Hello", "", "  \n"]
    run_repl(chat, ChatState())
    assert len(chat.session.asked) == 1
    chat.terminal.inputs = ["/exit", "never read"]
    run_repl(chat, ChatState())
    assert chat.terminal.inputs == ["never read"]


def test_leaving_with_ctrl_c_is_for_the_caller_to_see():
    chat = chat_with()
    chat.terminal.inputs = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        run_repl(chat, ChatState())


def test_a_stopped_answer_is_kept_and_the_chat_goes_on():
    chat = chat_with(["Once", " upon", KeyboardInterrupt()], ["Then"])
    state = after(chat, "Tell me a story", "go on")
    assert said(state)[1] == ("assistant", "Once upon")
    assert chat.terminal.notes == ["(stopped)"]
    assert said(state)[-1] == ("assistant", "Then")


def test_an_answer_stopped_while_it_is_written_ends_the_generation():
    chat = chat_with(["Once", " upon", " a", " time"])
    chat.terminal.write = interrupt_after(chat.terminal, n_pieces=2)
    state = after(chat, "Tell me a story")
    assert said(state)[1] == ("assistant", "Once upon")
    assert state.last.finish_reason == "interrupted"
    assert list(state.last) == []


def interrupt_after(terminal, n_pieces):
    show, pieces = terminal.write, []

    def write(text):
        show(text)
        pieces.append(text)
        if len(pieces) == n_pieces:
            raise KeyboardInterrupt

    return write


@pytest.mark.parametrize("last_shown", ["\n", "(cut off at max_tokens 2) /continue goes on"])
def test_ctrl_c_between_the_answer_and_the_prompt_takes_nothing_with_it(last_shown):
    chat = chat_with(["Once", " upon", " a", " time"], ["again"])
    chat.terminal.inputs = ["/set max_tokens 2", "Tell me a story", "go on"]

    def interrupted(show):
        def shown(text):
            show(text)
            if text == last_shown:
                signal.raise_signal(signal.SIGINT)

        return shown

    chat.terminal.write, chat.terminal.note = map(interrupted, (chat.terminal.write, chat.terminal.note))
    run_repl(chat, ChatState())
    assert [m.content for m in chat.session.asked[-1].messages] == ["Tell me a story", "Once upon", "go on"]


def test_ctrl_c_stops_an_answer_by_its_signal_too():
    chat = chat_with(["Once", " upon", " a", " time"], ["again"])
    show = chat.terminal.write
    chat.terminal.write = lambda text: (show(text), text == " upon" and signal.raise_signal(signal.SIGINT))
    chat.terminal.inputs = ["Tell me a story", "go on"]
    run_repl(chat, ChatState())
    assert chat.session.asked[-1].messages[1].content == "Once upon"


def test_an_unforeseen_error_says_that_the_conversation_is_saved():
    chat = chat_with(["Hi"], [ZeroDivisionError()])
    with pytest.raises(ZeroDivisionError):
        talk(chat, "Hello", "and then?")
    assert "--continue" in chat.terminal.notes[-1]
    resumed = chat.store.latest()
    assert (resumed.first, resumed.n_messages) == ("Hello", 2)


def test_an_unforeseen_error_saves_a_conversation_without_session_in_a_file_and_says_where(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "sessions").touch()  # where the directory should be
    chat = chat_with(["Hi"], [ZeroDivisionError()], directory=tmp_path / "sessions")
    with pytest.raises(ZeroDivisionError):
        talk(chat, "Hello", "and then?")
    (path,) = (tmp_path / "state" / "mistral").iterdir()
    assert str(path) in chat.terminal.notes[-1]
    assert said(load_chat(path)[1]) == [("user", "Hello"), ("assistant", "Hi")]


def test_an_unforeseen_error_is_raised_also_when_the_conversation_cannot_be_saved(tmp_path, monkeypatch):
    (tmp_path / "mistral").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    chat = chat_with(["Hi"], [ZeroDivisionError()], directory=tmp_path / "mistral")
    with pytest.raises(ZeroDivisionError):
        talk(chat, "Hello", "and then?")
    assert "cannot be made" in chat.terminal.notes[-1]


@pytest.mark.parametrize("end", [SystemExit(143), MistralError("memory ran out"), ZeroDivisionError()])
def test_what_came_of_an_answer_is_in_the_session_whatever_ends_it(end):
    chat = chat_with(["Once", " upon", end])
    with suppress(SystemExit, ZeroDivisionError):
        talk(chat, "Tell me a story")
    _, resumed = continued(chat)
    assert said(resumed.state) == [("user", "Tell me a story"), ("assistant", "Once upon")]
    assert resumed.state.tree.last.unfinished


def test_a_message_stopped_before_its_answer_comes_back_as_the_draft():
    chat = chat_with([KeyboardInterrupt()])
    state = after(chat, "Hello")
    assert (said(state), state.draft) == ([], "Hello")


def test_a_message_that_does_not_fit_comes_back_as_the_draft_and_changes_nothing():
    overflow = ContextOverflowError("the prompt has 600 tokens and the context 512", "ask for a longer --ctx")
    chat = chat_with(["Hi"], overflow, ["Better"])
    before = after(chat, "Hello")
    chat.terminal.inputs = ["//too long", "shorter"]
    run_repl(chat, before)
    assert chat.terminal.drafts == ["", "//too long", ""]
    assert [m.content for m in chat.session.asked[-1].messages] == ["Hello", "Hi", "shorter"]
    assert "does not fit" in chat.terminal.notes[1]


def test_an_answer_that_was_cut_off_says_where():
    chat = chat_with(["1", "2", "3"])
    after(chat, "/set max_tokens 2", "Count")
    assert (chat.terminal.shown, chat.terminal.notes[-1]) == (
        "12\n",
        "(cut off at max_tokens 2) /continue goes on",
    )


def test_an_empty_answer_is_an_error_and_not_a_message():
    chat = chat_with([])
    state = after(chat, "Hello")
    assert (said(state), state.draft) == ([], "Hello")
    assert "empty" in chat.terminal.notes[0]


def test_undo_takes_back_a_pair_and_keeps_the_system_prompt():
    state = after(chat_with(["a"], ["b"]), "/system Be brief", "1", "2", "/undo")
    assert said(state) == [("system", "Be brief"), ("user", "1"), ("assistant", "a")]


@pytest.mark.parametrize("command", ["/undo", "/retry"])
def test_there_is_nothing_to_take_back_before_the_first_answer(command):
    chat = chat_with()
    state = after(chat, "/system Be brief", command)
    assert said(state) == [("system", "Be brief")]
    assert chat.terminal.notes[-1] == "error: there is no answer yet"


def test_retry_answers_the_same_message_again():
    chat = chat_with(["first"], ["second"])
    state = after(chat, "Hello", "/retry")
    assert said(state) == [("user", "Hello"), ("assistant", "second")]
    assert chat.session.asked[0] == chat.session.asked[1]


@pytest.mark.parametrize("failure", [[KeyboardInterrupt()], MistralError("no"), []])
def test_a_retry_that_brings_nothing_keeps_the_answer_it_had(failure):
    state = after(chat_with(["first"], failure), "Hello", "/retry")
    assert said(state) == [("user", "Hello"), ("assistant", "first")]
    assert state.draft == ""


def test_clear_forgets_the_messages_and_keeps_system_prompt_and_settings():
    state = after(chat_with(["a"]), "/system Be brief", "/set top_k 5", "1", "/clear")
    assert said(state) == [("system", "Be brief")]
    assert state.params.top_k == 5


def test_system_shows_replaces_and_removes():
    chat = chat_with()
    state = after(chat, "/system", "/system\tBe\nbrief", "/system")
    assert chat.terminal.notes == ["there is no system prompt", "the system prompt is set", "Be\nbrief"]
    assert after(chat, "/system none", state=state).system is None
    assert chat.terminal.notes[-1] == "the system prompt is removed"


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        ("/set temperature 0", "temperature", 0),
        ("/set top_p 0.5", "top_p", 0.5),
        ("/set top_k 40", "top_k", 40),
        ("/set min_p  0.1 ", "min_p", 0.1),
        ("/set repeat_penalty 1.1", "repeat_penalty", 1.1),
        ("/set seed 42", "seed", 42),
        ("/set max_tokens 12", "max_tokens", 12),
    ],
)
def test_set_changes_one_setting(command, name, value):
    assert settings_of(after(chat_with(), command)) == settings_of(ChatState()) | {name: value}


def test_set_none_gives_an_optional_setting_back():
    state = after(chat_with(), "/set seed 42", "/set max_tokens 3", "/set seed none", "/set max_tokens none")
    assert settings_of(state) == settings_of(ChatState())


@pytest.mark.parametrize(
    "argument",
    [
        "temperature hot",
        "temperature none",
        "temperature -1",
        "temperature nan",
        "temperature inf",
        "top_p 1.5",
        "top_k 1.5",
        "min_p -0.1",
        "repeat_penalty 0",
        "seed -1",
        "seed 9223372036854775808",
        "max_tokens 0",
        "max_tokens -3",
        "heat 1",
    ],
)
def test_set_refuses_what_cannot_be_and_changes_nothing(argument):
    chat = chat_with()
    assert after(chat, f"/set {argument}") == ChatState()
    assert chat.terminal.notes[0].startswith("error: ")
    assert argument.split()[0] in chat.terminal.notes[0]


@pytest.mark.parametrize(
    ("typed", "nearest"), [("/hlep", "help"), ("/quit", "exit"), ("/HLEP", "help"), ("/sav x", "save")]
)
def test_an_unknown_command_names_the_nearest(typed, nearest):
    chat = chat_with()
    after(chat, typed)
    assert f"the nearest is /{nearest}" in chat.terminal.notes[0]


@pytest.mark.parametrize("typed", ["/", "/bye", "/漢字"])
def test_a_command_like_none_there_is_names_help(typed):
    chat = chat_with()
    after(chat, typed)
    assert "/help lists them" in chat.terminal.notes[0]


def test_commands_may_be_written_in_capitals():
    assert after(chat_with(), "/SET top_k 5").params.top_k == 5


def test_set_with_a_name_alone_shows_that_setting():
    chat = chat_with()
    assert after(chat, "/set temperature") == ChatState()
    assert [note.split() for note in chat.terminal.notes] == [["temperature", "0.7"]]


def test_what_takes_something_back_says_so():
    chat = chat_with(["a"], ["b"])
    after(chat, "1", "/undo", "2", "/clear")
    assert chat.terminal.notes == [
        "the last message and its answer are taken back; /branch has them",
        "all messages are forgotten; /branch has them",
    ]


@pytest.mark.parametrize("typed", ["/save", "/load", "/undo now", "/exit now"])
def test_a_command_with_too_much_or_too_little_is_not_run(typed):
    chat = chat_with()
    assert after(chat, typed) == ChatState()
    assert chat.terminal.notes[0].startswith(f"error: {typed.split()[0]} ")


def test_help_lists_every_command_and_fits_a_terminal():
    chat = chat_with()
    after(chat, "/help")
    assert all(any(note.startswith(f"/{name}") for note in chat.terminal.notes) for name in COMMANDS)
    assert all(len(line) <= 80 for note in chat.terminal.notes for line in note.splitlines())


def test_an_unknown_setting_is_told_the_nearest():
    chat = chat_with()
    after(chat, "/set temp 1")
    assert (
        chat.terminal.notes[0].splitlines()[1].startswith("hint: did you mean temperature? the settings are ")
    )


def test_stats_show_tokens_speed_context_and_cache():
    chat = chat_with(["Hi", " there"])
    after(chat, "Hello", "/stats")
    shown = "\n".join(chat.terminal.notes)
    assert "3 tokens, 1 of them in the cache" in shown
    assert "seed 7" in shown
    assert "5 of 512 tokens" in shown
    assert "5.0 MB" in shown


def test_every_setting_has_its_present_value():
    state = ChatState()
    assert set(settings_of(state)) == set(SETTINGS)
    for name, value in settings_of(state).items():
        assert with_setting(state, name, value) == state
