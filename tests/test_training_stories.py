"""The story grammars keep their promises on a fixed sample."""

import random
from collections.abc import Iterator

import pytest

from training.stories import HELD_OUT, _heroes, _make_cast, _suits, sample, sample_about, words
from training.stories.cast import Cast, base_slots
from training.stories.check import problems
from training.stories.facts import add_picks
from training.stories.grammar import Lines, an, compile_line, sentences, slots_of
from training.stories.plotfile import Plot, plots, sections
from training.stories.request import MODES

SHARED = ("openings", "colors", "closings", "morals", "sequels", "summaries", "brief")
MADE_WHILE_TELLING = {"h", "hs", "t", "f", "fs"}


def test_sampled_stories_break_no_rule() -> None:
    rng = random.Random(11)
    wrong = {what: story.text for story in (sample(rng) for _ in range(1500)) for what in problems(story)}
    assert not wrong


def test_the_same_seed_tells_the_same_story() -> None:
    assert sample(random.Random(5)) == sample(random.Random(5))


@pytest.mark.parametrize("plot", plots())
def test_every_plot_can_be_told_in_every_mode(plot: str) -> None:
    rng = random.Random(plot)
    for mode in MODES:
        story = sample_about(rng, plot=plot, mode=mode)
        assert story.plot == plot and not [p for p in problems(story) if p != "held out"]


@pytest.mark.parametrize(("hero", "thing"), [("fox", "lantern"), ("zorilla", "sprocket"), ("whale", "kite")])
def test_a_story_is_about_what_was_asked_known_or_not(hero: str, thing: str) -> None:
    story = sample_about(random.Random(1), hero=hero, obj=thing, mode="with_object")
    assert (story.hero, story.object) == (hero, thing)
    assert hero in story.text and thing in story.text
    assert hero in story.request.lower() and thing in story.request.lower()


def test_held_out_pairs_are_a_twentieth_or_so_and_are_not_sampled() -> None:
    pairs = len(words.kinds()) * (len(words.things()) + len(plots()))
    assert 0.03 < len(HELD_OUT) / pairs < 0.05
    rng = random.Random(2)
    for story in (sample(rng) for _ in range(500)):
        assert (story.hero, story.facts["object"]) not in HELD_OUT
        assert (story.hero, story.plot) not in HELD_OUT


def _lines(plot: Plot) -> Iterator[Lines]:
    yield from (*plot.opens, *plot.closes, *plot.afters)
    for beat in plot.beats:
        yield from beat.lines


def _known_slots(plot: Plot) -> set[str]:
    story_cast = _cast(plot)
    slots = base_slots(random.Random(0), story_cast)
    add_picks(random.Random(0), story_cast, plot, slots)
    return set(slots) | MADE_WHILE_TELLING


def _cast(plot: Plot) -> Cast:
    rng = random.Random(0)
    kind = next(kind for kind in _heroes(False) if _suits(kind, plot))
    return _make_cast(rng, kind, plot, words.things()[plot.objects[0]])


@pytest.mark.parametrize("plot", plots())
def test_every_line_uses_known_slots_and_names_the_friend_at_most_once_anew(plot: str) -> None:
    known = _known_slots(plots()[plot])
    shared = [group for name in SHARED for groups in sections(name + ".txt").values() for group in groups]
    for group in (*_lines(plots()[plot]), *shared):
        for line in group:
            assert slots_of(line.text) <= known, line.text
            assert line.text.count("{f}") + line.text.count("{^f}") <= 1, line.text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("[Then|Soon] {h} came.", ["Then {h} came.", "Soon {h} came."]),
        ('{h} ran. "{i} came," said {t}.', ['{^h} ran. "{^i} came," said {t}.']),
        ('"Stop!" {he} cried.', ['"Stop!" {he} cried.']),
        ('"Stop!" {he} ran.', ['"Stop!" {^he} ran.']),
        ('"Come, {n}!" said {f}.', ['"Come, {v}!" said {f}.']),
    ],
)
def test_a_template_expands_its_choices_and_finds_where_sentences_begin(
    template: str, text: list[str]
) -> None:
    assert [line.text for line in compile_line(template)] == text


def test_sentences_and_articles() -> None:
    assert sentences('"Stop!" cried Ruby. "Why?" Then she ran.') == [
        '"Stop!" cried Ruby.',
        '"Why?"',
        "Then she ran.",
    ]
    assert [an(word) for word in ("owl", "unicorn", "honest fox", "ukulele")] == [
        "an owl",
        "a unicorn",
        "an honest fox",
        "a ukulele",
    ]
