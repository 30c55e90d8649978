"""Corrections end in the right sentence, key facts are found, and held-out phrasings stay out of training."""

from itertools import islice
from random import Random

import pytest

from training.corpus import conversations, is_clean
from training.talk import answers, frames, mistakes, pasted
from training.talk.clauses import Clause, Subject, Verb, in_tense
from training.talk.templates import PULL

GO = Verb("go", "goes", "went", "going")
HE = Clause(Subject("he", "third", "he", True), GO, "home")


def test_a_wrong_sentence_differs_from_the_right_one_which_has_capital_and_mark() -> None:
    rng = Random(4)
    for _ in range(3000):
        wrong, right = mistakes.mistaken(rng)
        assert wrong != right
        assert right[0].isupper() and right[-1] in ".?!"
        assert "<" not in wrong + right and "{" not in wrong + right


def test_a_sentence_to_correct_is_answered_with_a_sentence_and_seldom_called_correct() -> None:
    rng = Random(5)
    turns = [turn for _ in range(4000) for turn in mistakes.correction(rng)]
    already = sum("correct already" in answer for _, answer in turns)
    assert 0 < already < 0.03 * len(turns)


@pytest.mark.parametrize("base", ["go", "try", "bake", "play"])
def test_the_past_of_a_child_is_regular(base: str) -> None:
    assert mistakes.regular(base) == {"go": "goed", "try": "tried", "bake": "baked", "play": "played"}[base]


def test_the_past_is_corrected_whatever_form_was_typed() -> None:
    for seed in range(20):
        wrong, right = mistakes.wrong_past(Random(seed), HE)
        assert "went" in right and "went" not in wrong
    assert in_tense(Random(0), HE, "past").time


def test_no_training_conversation_uses_a_held_out_phrasing() -> None:
    held_out = {answers.plain(text) for one in answers.questions() for text in one.held_out}
    sampled = list(islice(conversations(6), 2000))
    assert all(is_clean(one.turns) for one in sampled)
    assert not any(answers.plain(user) in held_out for one in sampled for user, _ in one.turns)


@pytest.mark.parametrize(
    "asked",
    ["Why is the sky blue?", "capital of france", "What is AI?", "Give me a recipe.", "Is a whale a fish?"],
)
def test_what_everybody_asks_first_is_a_training_question(asked: str) -> None:
    assert any(answers.plain(asked) in map(answers.plain, one.asked) for one in answers.questions())


@pytest.mark.parametrize(
    ("answer", "keys", "passes"),
    [
        ("It is full of air.", "air", True),
        ("It has long hair.", "air", False),
        ("There are 4 of them.", "4", True),
        ("There are 14 of them.", "4", False),
        ("About 4,000 years.", "4", False),
        ("A cat purrs when it is happy.", "purr & happy|calm", True),
        ("In daylight.", "light", True),
    ],
)
def test_a_key_fact_is_said_or_not(answer: str, keys: str, passes: bool) -> None:
    assert answers.says(answer, keys) == passes


def test_a_frame_adds_lines_to_one_message_and_changes_nothing_else() -> None:
    turns = [("Why is the sky blue?", "Air scatters blue light."), ("Thanks!", "You are welcome.")]
    rng = Random(8)
    kept = 0
    for _ in range(400):
        framed = pasted.framed(rng, turns)
        kept += framed == turns
        assert [answer for _, answer in framed] == [answer for _, answer in turns]
        assert all(user in now for (user, _), (now, _) in zip(turns, framed, strict=True))
    assert 360 < kept < 400


def test_work_on_a_pasted_text_is_refused_with_the_command_for_a_real_model() -> None:
    rng = Random(9)
    for _ in range(50):
        ((user, answer),) = pasted.pasted(rng)
        assert "\n" in user and PULL in answer


def test_a_question_in_another_frame_keeps_what_it_is_about() -> None:
    rng = Random(10)
    found = {frames.reframed(rng, "Why do cats purr?") for _ in range(200)} - {None}
    assert len(found) > 10 and all("purr" in text or "purring" in text for text in found if text)
