"""The context ledger: its numbers, what it offers to drop, and that nothing is cut without a word."""

import pytest
from scripted_chat import after, chat_with, said, talk

from mistralcli import store as models
from mistralcli.cli.chat.ledger import Ledger, Toolbar, ledger_of, prompt_ids, without_oldest
from mistralcli.cli.chat.state import ChatState
from mistralcli.conversation import Message
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session


def test_the_toolbar_counts_what_the_model_is_sent():
    chat = chat_with(["four words and format"])
    talk(chat, "two words")
    assert chat.terminal.toolbars == ["0 of 512 tokens, 512 left", "8 of 512 tokens, 504 left"]


def test_the_toolbar_is_empty_while_the_model_loads_and_when_it_cannot_be_asked():
    chat = chat_with()
    chat.model.ready = lambda: False
    toolbar = Toolbar(chat.model, ChatState(system="Be brief"))
    assert toolbar() == ""
    chat.model.ready = lambda: True
    assert toolbar() == "2 of 512 tokens, 510 left"


def test_the_toolbar_says_from_which_message_on_a_window_sees():
    # <user> a b <assistant> c <user> d e <assistant> f: position 4 is c, 5 the mark before message 3, 6 its d
    chat = chat_with(["c"], ["f"], window=4)
    state = after(chat, "a b", "d e")
    for window, where in (
        (4, "message 3"),
        (3, "within message 3"),
        (5, "within message 2"),
        (6, "message 2"),
    ):
        chat.session.config.sliding_windows = (window, window)
        assert ledger_of(chat.session, state).toolbar().endswith(f" · sees directly from {where}")
    for windows in ((None, 4), (10, 4), (500, 500)):
        chat.session.config.sliding_windows = windows
        assert ledger_of(chat.session, state).first_seen is None


@pytest.fixture(scope="module")
def demo():
    return open_session(models.resolve_demo(), SessionOptions())


def test_what_the_window_of_the_built_in_model_sees_begins_where_the_ledger_says(demo):
    """Checked by the text of the ids that the last position sees."""
    state = ChatState(system="Be brief.")
    for n in range(8):
        state = state.with_message(f"Question {n} about a fox and a boat")
        state = state.with_answer(f"Answer {n}: " + "the fox sat in the boat " * 5, unfinished=False)
    ledger = ledger_of(demo, state)
    ids = prompt_ids(demo, state.conversation)
    assert (ledger.n_used, ledger.window) == (len(ids), 256)
    seen = demo.tokenizer.decode(ids[-256:])
    whole = [i + 1 for i, m in enumerate(state.tree.messages()) if m.content.strip() in seen]
    assert ledger.within and ledger.first_seen == whole[0] - 1
    assert whole == list(range(whole[0], 17))


def test_a_turn_that_does_not_fit_is_told_in_numbers_with_what_to_drop_and_then_fits():
    chat = chat_with(["b " * 10], ["d " * 10], ["f"], n_ctx=40)
    state = after(chat, "a " * 5, "c " * 5)
    before = len(prompt_ids(chat.session, state.conversation))
    state = after(chat, "e e e e", state=state)
    error, hint = chat.terminal.notes[-1].splitlines()
    n_all = before + 6
    assert f"the context has 40 tokens, what is before takes {n_all - 4} and this message 4" in error
    assert f"{n_all + 1 - 40} too many" in error
    assert hint == "hint: /drop 1 forgets the oldest turn (19 tokens)"
    assert state.draft == "e e e e" and len(state.tree.nodes) == 4
    state = after(chat, "/drop 1", "e e e e", state=state)
    assert "(19 tokens)" in chat.terminal.notes[-1]
    assert [text[:1] for _, text in said(state)] == ["c", "d", "e", "f"]
    assert len(state.tree.nodes) == 6
    assert "1 turn dropped" in ledger_of(chat.session, state).toolbar()


@pytest.mark.parametrize(
    ("n_words", "offer"), [(6, "/drop 1 "), (17, "/drop 2 "), (18, "/drop 3 "), (36, "/drop 4 ")]
)
def test_the_least_drop_that_makes_room_is_offered(n_words, offer):
    """Each turn takes 8 tokens of 40, and an answer is to have 5, or what dropping all leaves."""
    chat = chat_with(*[["b b b"]] * 4, n_ctx=40)
    state = after(chat, *[f"a a {n}" for n in range(4)])
    state = after(chat, " ".join("e" * n_words), state=state)
    assert f"hint: {offer}" in chat.terminal.notes[-1]


def test_a_message_that_fits_in_no_context_is_told_so():
    chat = chat_with(["b"], n_ctx=20)
    after(chat, "a", "e " * 30)
    assert "hint: it does not fit alone either: shorten this message" in chat.terminal.notes[-1]


def test_an_answer_that_fills_the_context_says_so_and_what_makes_room_to_go_on():
    chat = chat_with(["b " * 10], ["1", "2"], n_ctx=40)
    chat.session.complete_chat = cut_at_the_end(chat.session.complete_chat)
    after(chat, "a " * 5, "count " * 4)
    assert "the context of 40 tokens is full) /drop 1 forgets the oldest turn" in chat.terminal.notes[-1]


def cut_at_the_end(complete):
    def completed(conversation, params, *, max_tokens, stop):
        """As the engine ends an answer when there is no room."""
        if len(conversation.messages) > 1:
            max_tokens = 2
        return complete(conversation, params, max_tokens=max_tokens, stop=stop)

    return completed


def test_a_dropped_turn_stays_in_the_tree_and_is_sent_again_when_it_is_asked_again():
    chat = chat_with(["a"], ["b"], ["c"])
    state = after(chat, "one", "two", "/drop 2")
    assert said(state) == []
    assert [node.message.content for node in state.tree.nodes] == ["one", "a", "two", "b"]
    assert [text for _, text in said(after(chat, "/retry", state=state))] == ["two", "c"]
    after(chat, "/drop 1", state=state)
    assert "no turn that could be dropped" in chat.terminal.notes[-1]


def test_dropping_takes_the_oldest_that_are_still_sent():
    state = ChatState()
    for n in range(4):
        state = state.with_message(f"q{n}").with_answer(f"a{n}", unfinished=False)
    assert without_oldest(without_oldest(state, 1), 2).conversation.messages == (
        Message("user", "q3"),
        Message("assistant", "a3"),
    )
    assert without_oldest(state, 9).conversation.messages == ()


def test_tokens_lists_messages_and_adds_up():
    chat = chat_with(["b b b"], ["d"])
    state = after(chat, "/system Be brief", "a", "c", "/drop 1")
    chat.terminal.notes = []
    after(chat, "/tokens", state=state)
    notes = chat.terminal.notes
    counts = [int(note[16:24].replace(",", "")) for note in notes[:6]]
    assert [note.split()[1] for note in notes[:4]] == ["dropped", "dropped", "user", "assistant"]
    assert counts == [1, 3, 1, 1, 2, 3]
    assert notes[6:] == [
        "7 of 512 tokens used, 505 left",
        "1 turn dropped: kept here, and not sent to the model",
    ]
    assert ledger_of(chat.session, state) == Ledger(7, 512, None, None, False, 1)
