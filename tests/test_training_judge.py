"""The judge of the demo model: what loops, what passes, what a bar is."""

import itertools
from dataclasses import replace

import pytest

from training.corpus import Check, heldout_prompts
from training.evaluate import LongContext, Results, missed_bars, report
from training.judge import LOOP_TIMES, Reply, Transcript, judged, loops, scores

ENDLESS = itertools.count(100)
FOX = Check(hero="fox", name="Rusty", thing="lantern")
STORY = (
    "Once there was a fox named Rusty. Rusty found an old lantern by the mill. The lantern was cold, "
    "so Rusty lit it. In the evening the lantern shone, and Rusty was glad."
)


def spread(n_between: int, times: int) -> list[int]:
    """The run 1 2 3 4 `times` times, with `n_between` other ids after each."""
    return [token for _ in range(times) for token in (1, 2, 3, 4, *itertools.islice(ENDLESS, n_between))]


def test_a_run_of_four_ids_may_come_four_times_within_200_and_not_five() -> None:
    assert not loops(spread(10, LOOP_TIMES))
    assert loops(spread(10, LOOP_TIMES + 1))
    assert loops([7] * 8) and not loops([7] * 7)


def test_the_last_of_five_runs_may_just_end_beyond_200_ids() -> None:
    assert loops([*spread(45, 4), 1, 2, 3, 4])  # begins at 0 and ends with id 200
    assert not loops([*spread(45, 3), *spread(46, 1), 1, 2, 3, 4])


def test_a_story_passes_with_its_hero_by_name_and_its_object_to_the_end() -> None:
    assert judged("", FOX, STORY, range(50), True).passed


def test_a_hero_or_object_inside_another_word_does_not_count() -> None:
    hidden = "Ada wanted to hear the growl of thunder. It was a boring evening, but Ada wanted to stay."
    assert not judged("", Check(hero="ant"), hidden, range(30), True).passed
    assert not judged("", Check(hero="owl", thing="ring"), hidden, range(30), True).passed
    assert judged("", Check(hero="ant"), hidden + " The ants left.", range(30), True).passed


@pytest.mark.parametrize(
    ("answer", "n_same", "finished"),
    [
        (STORY.replace("fox", "bear"), 0, True),
        (STORY.replace("Rusty", "Ruby"), 0, True),
        (STORY.replace("lantern", "kite"), 0, True),
        (STORY.rpartition("so Rusty")[0] + "And so it went on. " * 8, 0, True),
        (STORY, 9, True),
        (STORY, 0, False),
    ],
    ids=["other hero", "other name", "other object", "hero lost", "loops", "has no end"],
)
def test_a_story_does_not_pass_when_anything_is_wrong(answer: str, n_same: int, finished: bool) -> None:
    assert not judged("", FOX, answer, [*range(50), *[1] * n_same], finished).passed


def test_a_question_needs_a_fact_of_each_group() -> None:
    check = Check(keys="air & scatter|spread & blue")
    assert judged("", check, "The air spreads blue light.", range(9), True).passed
    for wrong in ("The air is blue.", "It spreads blue light.", "I do not know."):
        assert not judged("", check, wrong, range(9), True).passed


def test_a_list_has_the_length_that_was_asked() -> None:
    for n_items, passed in ((3, False), (4, True), (5, False)):
        answer = "\n".join(f"{i}. Sleep well." for i in range(1, n_items + 1))
        assert judged("", Check(n_items=4), answer, range(9), True).passed is passed


def test_the_answer_to_another_question_fails_the_check_of_every_held_out_question() -> None:
    asked = [prompt.turns[0] for prompt in heldout_prompts() if prompt.kind == "question"]
    nonsense = "I like to walk in the park with my friends on a day like this."
    assert [text for text, check in asked if judged(text, check, nonsense, range(9), True).passed] == []


def test_the_held_out_prompts_are_a_hundred_of_three_kinds_and_always_the_same() -> None:
    prompts = heldout_prompts()
    kinds = [prompt.kind for prompt in prompts]
    assert [kinds.count(kind) for kind in ("story", "question", "chat")] == [40, 45, 15]
    assert all(len(prompt.turns) == (3 if prompt.kind == "chat" else 1) for prompt in prompts)
    assert all(prompt.turns[0][1].hero for prompt in prompts if prompt.kind == "story")
    assert len({prompt.turns[0][0] for prompt in prompts if prompt.kind == "question"}) == 45
    assert prompts == heldout_prompts()


def reply(passed: bool = True, looping: bool = False) -> Reply:
    return Reply("Why?", "Because.", 4, True, looping, passed)


def results(**changes: object) -> Results:
    """Results that miss no bar, with changes."""
    kinds = [("story", 10), ("question", 20), ("chat", 3)]
    transcripts = tuple(Transcript(kind, 0, (reply(),)) for kind, n in kinds for _ in range(n))
    flat = LongContext([1.0, 1.01, 1.0, 0.99], [1.0, 1.01, 1.0, 0.99])
    good = Results(transcripts, {"all": 1.01}, {"all": 1.0}, flat)
    return replace(good, **changes)  # type: ignore[arg-type]


def failing(kind: str, n: int) -> tuple[Transcript, ...]:
    """The transcripts of `results`, of which the first `n` of a kind do not pass."""
    numbers = itertools.count()
    return tuple(
        replace(one, replies=(reply(passed=False),)) if one.kind == kind and next(numbers) < n else one
        for one in results().transcripts
    )


def test_good_results_miss_no_bar() -> None:
    assert list(missed_bars(results())) == []
    assert list(missed_bars(results(transcripts=failing("story", 1)))) == []
    assert list(missed_bars(results(transcripts=failing("question", 3)))) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transcripts": failing("story", 2)}, "story: 8 of 10"),
        ({"transcripts": failing("question", 4)}, "question: 16 of 20"),
        ({"transcripts": (Transcript("chat", 0, (reply(looping=True),)),)}, "1 answers loop"),
        ({"losses": {"all": 1.03}}, "1.0300 against 1.0000"),
        ({"long_context": LongContext([1.0, 1.0, 1.0, 1.03], [1.0, 1.0, 1.0, 1.03])}, "grows"),
        ({"long_context": LongContext([1.0, 1.0, 1.0, 1.01], [1.0] * 4)}, "rolling cache"),
    ],
    ids=["stories", "questions", "loop", "int4", "position", "rolling"],
)
def test_each_bar_can_be_missed(changes: dict[str, object], words: str) -> None:
    (missed,) = missed_bars(results(**changes))
    assert words in missed
    assert len(list(report(results(**changes)))) >= 7


def test_a_chat_passes_when_all_its_turns_do() -> None:
    mixed = Transcript("chat", 0, (reply(), reply(passed=False), reply()))
    assert scores([mixed, replace(mixed, replies=(reply(),) * 3)])["chat"].n_passed == 1
