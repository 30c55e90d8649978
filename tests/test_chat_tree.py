"""Conversations are trees: what moves in them, and that nothing in them is ever lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_chat import after, chat_with, said

from mistralcli.cli.chat.events import applied, changes
from mistralcli.cli.chat.state import ChatState
from mistralcli.cli.chat.tree import Tree
from mistralcli.conversation import Message
from mistralcli.errors import MistralError


def contents(state):
    return [node.message.content for node in state.tree.nodes]


def test_a_branch_is_the_way_from_its_last_message_to_the_first():
    tree = Tree().add(Message("user", "a")).add(Message("assistant", "b")).add(Message("user", "c"))
    other = tree.move(0).add(Message("assistant", "d"))
    assert (tree.path(), other.path(), other.path(2)) == ((0, 1, 2), (0, 3), (0, 1, 2))
    assert other.leaves() == [2, 3]
    assert Tree().path() == () and Tree().back() == Tree()


@given(st.lists(st.none() | st.integers(0, 40), max_size=40))
def test_every_message_is_on_the_way_to_a_leaf_and_what_is_added_reorders_none(parents):
    tree = Tree()
    for n, parent in enumerate(parents):
        before = tree.leaves()
        tree = tree.move(None if parent is None or n == 0 else parent % n).add(Message("user", "x"))
        kept = [leaf for leaf in tree.leaves() if leaf in before]
        assert kept == [leaf for leaf in before if leaf in kept]
    assert {index for leaf in tree.leaves() for index in tree.path(leaf)} == set(range(len(parents)))


@pytest.mark.parametrize(
    "commands",
    [["/undo"], ["/retry"], ["/clear"], ["/edit 1", "else"], ["/edit 2"], ["/continue"], ["/drop 1"]],
)
def test_no_command_loses_an_answer(commands):
    chat = chat_with(["first"], ["second"], ["third"])
    chat.terminal.edits = ["mine"]
    before = after(chat, "Hello")
    state = after(chat, *commands, state=before)
    assert state.tree.nodes[: len(before.tree.nodes)] == before.tree.nodes
    assert state != before
    assert said(after(chat, "/branch 1", state=state))[-1:] in ([("assistant", "first")], [])


def test_retry_answers_beside_the_first_answer_and_branch_goes_back():
    chat = chat_with(["first"], ["second"], ["more"])
    state = after(chat, "Hello", "/retry")
    assert said(state) == [("user", "Hello"), ("assistant", "second")]
    state = after(chat, "/branch 1", "go on", state=state)
    assert [text for _, text in said(state)] == ["Hello", "first", "go on", "more"]
    after(chat, "/branch", state=state)
    assert [note[:20].split() for note in chat.terminal.notes[-2:]] == [
        ["*", "1", "4", "messages,"],
        ["2", "2", "messages,"],
    ]
    assert "from message 2 on: second" in chat.terminal.notes[-1]


def test_what_is_said_again_in_the_same_place_is_the_same_branch():
    chat = chat_with(["a"], ["a"], ["a"])
    state = after(chat, "one", "/retry", "/edit 1", "one")
    assert contents(state) == ["one", "a"]
    assert "the same answer as before" in chat.terminal.notes[-1]


def test_edit_offers_a_message_as_the_draft_and_what_is_sent_stands_beside_it():
    chat = chat_with(["a"], ["b"], ["c"])
    state = after(chat, "one", "//two", "/edit 3")
    assert (state.draft, said(state)) == ("//two", [("user", "one"), ("assistant", "a")])
    state = after(chat, "three", state=state)
    assert [text for _, text in said(state)] == ["one", "a", "three", "c"]
    assert said(after(chat, "/branch 1", state=state))[2:] == [("user", "/two"), ("assistant", "b")]


def test_edit_of_an_answer_opens_it_in_the_editor():
    chat = chat_with(["a"], ["b"])
    chat.terminal.edits = ["mine"]
    state = after(chat, "one", "/edit 2", "two")
    assert [text for _, text in said(state)] == ["one", "mine", "two", "b"]
    assert contents(state) == ["one", "a", "mine", "two", "b"]
    assert after(chat, "/edit 2", state=state).tree == state.tree  # the editor is closed without a change


@pytest.mark.parametrize("argument", ["0", "3", "x", "-1", "1.5", "9" * 30, "²"])
@pytest.mark.parametrize("command", ["/edit", "/branch", "/drop"])
def test_a_number_that_is_none_of_this_chat_is_refused(command, argument):
    chat = chat_with(["a"])
    before = after(chat, "one")
    assert after(chat, f"{command} {argument}", state=before).tree == before.tree
    assert "of this chat: there " in chat.terminal.notes[-1]


def test_continue_goes_on_with_an_answer_that_was_cut_off():
    chat = chat_with(["Once", " upon ", KeyboardInterrupt()], [" a", " time"])
    state = after(chat, "Tell", "/continue")
    assert said(state) == [("user", "Tell"), ("assistant", "Once upon a time")]
    sent = chat.session.asked[-1].messages[-1]
    assert (sent.content, sent.prefix) == ("Once upon", True)
    assert contents(state) == ["Tell", "Once upon ", "Once upon a time"]
    assert [node.unfinished for node in state.tree.nodes] == [False, True, False]


def test_a_continuation_is_taken_up_on_the_screen_at_its_last_line_or_open_code():
    chat = chat_with(["one\n```py\nx\ny", KeyboardInterrupt()], ["\nz\n```"], [" end"])
    state = after(chat, "Tell")
    chat.terminal.shown = ""
    state = after(chat, "/continue", state=state)
    assert chat.terminal.shown == "```py\nx\ny\nz\n```\n"
    chat.terminal.shown = ""
    after(chat, "/continue", state=state)
    assert chat.terminal.shown == "``` end\n"


@pytest.mark.parametrize("failure", [[KeyboardInterrupt()], MistralError("no"), []])
def test_a_continuation_that_brings_nothing_changes_nothing(failure):
    chat = chat_with(["Once", KeyboardInterrupt()], failure)
    before = after(chat, "Tell")
    assert after(chat, "/continue", state=before) == before


@pytest.mark.parametrize("command", ["/continue", "/retry", "/undo"])
def test_there_is_no_answer_to_go_on_with_before_the_first(command):
    chat = chat_with()
    assert after(chat, command) == ChatState()
    assert chat.terminal.notes == ["error: there is no answer yet"]


INPUTS = (
    "one",
    "two",
    "/undo",
    "/retry",
    "/clear",
    "/edit 1",
    "/edit 3",
    "/branch 1",
    "/branch 2",
    "/continue",
)
CHANGES = ("/drop 1", "/system Be brief", "/system none", "/set top_k 3", '/set stop "x"', "/set stop none")
STEPS = st.lists(st.sampled_from(INPUTS + CHANGES), max_size=12)


@given(STEPS)
def test_events_lead_from_any_state_to_the_next(inputs):
    chat = chat_with(*[[f"answer {n}"] for n in range(20)])
    state = replayed = ChatState()
    for text in inputs:
        before, state = state, after(chat, text, state=state)
        for event in changes(before, state):
            replayed = applied(replayed, event)
        assert (replayed.tree, replayed.system, replayed.dropped) == (state.tree, state.system, state.dropped)
        assert (replayed.params, replayed.stop, replayed.draft) == (state.params, state.stop, state.draft)
        assert [m.role for m in state.conversation.messages if m.role != "system"] == [
            ("user", "assistant")[i % 2] for i in range(len(state.sent))
        ]
