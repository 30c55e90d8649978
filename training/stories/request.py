"""What a user might say to get a given story: in many words, with more or less of it named."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from training.stories.cast import Cast
from training.stories.grammar import capital
from training.stories.plotfile import Plot
from training.stories.words import rows

# fmt: off
NOUNS = {
    "plain": (
        "a story", "a story", "a story", "a story", "a nice story", "a tale", "a good story", "a children's story",
        "a new story", "a fairy tale",
    ),
    "bedtime": ("a bedtime story", "a bedtime story", "a good-night story", "a quiet bedtime story"),
    "funny": ("a funny story", "a funny story", "a silly story", "a story that makes me laugh"),
    "adventure": ("an adventure story", "an exciting story", "an adventure", "a story full of adventure"),
    "short": ("a very short story", "a very short story", "a tiny story", "a quick story", "a mini story"),
    "brief": ("a short story", "a short story", "a short story", "a little story", "a short tale"),
    "long": ("a long story", "a longer story", "a nice long story"),
}
# fmt: on
# Ways to say what the story is about, by how often they are used.
MODES = {
    "kind": 17,
    "named": 13,
    "does": 13,
    "named_does": 13,
    "with_object": 12,
    "in_place": 4,
    "with_friend": 5,
    "full": 5,
    "details": 10,
    "theme": 5,
    "theme_kind": 3,
    "object": 3,
    "place": 2,
    "bare": 3,
}


@dataclass(frozen=True, slots=True)
class Request:
    """`text` and what it names: a subset of kind, name, object, place, friend, plot, lesson."""

    text: str
    asked: frozenset[str]
    lesson: str = ""


@cache
def _patterns() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    key = ""
    for row in rows("requests.txt"):
        if row.startswith("["):
            key = row[1:-1]
        else:
            found[key] = (*found.get(key, ()), row)
    return found


def _hero(rng: random.Random, cast: Cast, slots: dict[str, str], named: bool) -> str:
    """ "a fox", "a curious fox", "a fox named Ruby", "Ruby the fox"."""
    kind = slots["tk"] if rng.random() < 0.15 else slots["a_kind"]
    if not named:
        return kind
    if cast.gender != "they" and "child" not in cast.kind.tags and rng.random() < 0.2:
        return f"{cast.name} the {cast.kind.word}"
    if cast.gender != "they" and rng.random() < 0.12:
        return rng.choice(("{n}, {a}", "{a} whose name is {n}", "{a} with the name {n}")).format(
            n=cast.name, a=kind
        )
    return f"{kind} {rng.choice(('named', 'called', 'named'))} {cast.name}"


def _with_object(rng: random.Random, slots: dict[str, str], text: str) -> str:
    full = slots["ao"] if rng.random() < 0.2 else slots["ano"]
    return text.format_map({**slots, "ano": full})


Subject = tuple[str, set[str]]


def _does(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str], named: bool) -> Subject:
    ask = rng.choice(plot.asks)
    asked = {"kind", "plot"} | ({"object"} if "{ano}" in ask or "{noun}" in ask else set())
    if named:
        asked.add("name")
    who = "who" if rng.random() < 0.85 else "that"
    return f"{_hero(rng, cast, slots, named)} {who} {_with_object(rng, slots, ask)}", asked


STATE = re.compile(r"an? \w+ \{noun\}")


def _things_asked(plot: Plot) -> tuple[str, ...]:
    """Ways to name the object beside the hero: "a kite", "her kite" and, as the plot has it, "a lost kite"."""
    states = tuple(theme for theme in plot.themes if STATE.fullmatch(theme))
    return ("{ano}", "{ano}", "{ano}", "{his} {noun}", *states * 2)


def _with_thing(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> Subject:
    named = rng.random() < 0.5
    thing = _with_object(rng, slots, rng.choice(_things_asked(plot)))
    asked = {"kind", "object"} | ({"name"} if named else set())
    hero = _hero(rng, cast, slots, named)
    if cast.gender != "they" and rng.random() < 0.2:
        having = ("with", "who has", "who owns") if thing.startswith("a") else ("with",)
        return f"{hero} {rng.choice(having)} {thing}", asked
    return f"{hero} and {thing}", asked


def _full(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> Subject:
    """Hero, name, place and what happens: "a fox named Ruby who lives in a forest and finds a key"."""
    ask, many = rng.choice(plot.asks), cast.gender == "they"
    asked = {"kind", "name", "plot", "place"}
    asked |= {"object"} if "{ano}" in ask or "{noun}" in ask else set()
    place = slots[rng.choice(("in_a", "in_the"))]
    hero, does = _hero(rng, cast, slots, True), _with_object(rng, slots, ask)
    if rng.random() < 0.5:
        return f"{hero} who live{'' if many else 's'} {place} and {does}", asked
    return f"{hero} {place} who {does}", asked


def _in_place(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> Subject:
    named = rng.random() < 0.3
    place = slots[rng.choice(("in_a", "in_the"))]
    lives = rng.choice(("", "", "who lives " if cast.gender != "they" else "who live "))
    asked = {"kind", "place"} | ({"name"} if named else set())
    return f"{_hero(rng, cast, slots, named)} {lives}{place}", asked


def _with_friend(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> Subject:
    if rng.random() < 0.3:
        return f"{_hero(rng, cast, slots, True)} and {slots['af']}", {"kind", "name", "friend"}
    return f"{slots['a_kind']} and {slots['afk']}", {"kind", "friend"}


def _theme(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str], kind: bool) -> Subject:
    theme = rng.choice(plot.themes)
    asked = {"plot"} | ({"object"} if "{ano}" in theme or "{noun}" in theme else set())
    text = _with_object(rng, slots, theme)
    if not kind:
        return text, asked
    return f"{text}, with {slots['a_kind']} in it", asked | {"kind"}


def _object(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> Subject:
    return _with_object(rng, slots, "{ano}"), {"object"}


SUBJECTS: dict[str, Callable[[random.Random, Cast, Plot, dict[str, str]], Subject]] = {
    "kind": lambda rng, cast, plot, slots: (_hero(rng, cast, slots, False), {"kind"}),
    "named": lambda rng, cast, plot, slots: (_hero(rng, cast, slots, True), {"kind", "name"}),
    "does": lambda rng, cast, plot, slots: _does(rng, cast, plot, slots, False),
    "named_does": lambda rng, cast, plot, slots: _does(rng, cast, plot, slots, True),
    "with_object": _with_thing,
    "in_place": _in_place,
    "with_friend": _with_friend,
    "theme": lambda rng, cast, plot, slots: _theme(rng, cast, plot, slots, False),
    "theme_kind": lambda rng, cast, plot, slots: _theme(rng, cast, plot, slots, True),
    "object": _object,
    "full": _full,
}
_MODE_NAMES, _MODE_WEIGHTS = tuple(MODES), tuple(MODES.values())


NAMED_BY = {  # what a slot of the patterns under "details" asks for
    "kind": ("{kind}", "{a_kind}"),
    "name": ("{n}",),
    "object": ("{ano}", "{noun}"),
    "place": ("{in_a}", "{in_the}", "{place}"),
    "friend": ("{fkind}", "{afk}", "{af}"),
    "lesson": ("{lesson}",),
}


def _details(rng: random.Random, plot: Plot, slots: dict[str, str], noun: str) -> Request:
    """Several sentences, or a list of what must be in the story."""
    pattern = rng.choice(_patterns()["details"])
    lesson = rng.choice(plot.phrases["lesson"]).format_map(slots)
    asked = {key for key, marks in NAMED_BY.items() if any(mark in pattern for mark in marks)}
    text = pattern.format_map(slots | {"a": noun, "lesson": lesson})
    return Request(_casual(rng, text), frozenset(asked), lesson if "lesson" in asked else "")


def _casual(rng: random.Random, text: str) -> str:
    """The same request as people type it: often without capitals, full stop or question mark."""
    chance = rng.random()
    if chance < 0.72:
        return capital(text)
    if chance < 0.84:
        return capital(text.rstrip(".?"))
    text = text.replace("I'd", "i'd").lower() if chance < 0.97 else text.lower().replace("please", "pls")
    return text.rstrip(".?") if rng.random() < 0.8 else text


def compose(
    rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str], manner: str, must: str | None = None
) -> Request:
    """A request for a story; `manner` is a key of NOUNS, `must` forces one of MODES."""
    mode = must or rng.choices(_MODE_NAMES, _MODE_WEIGHTS)[0]
    noun = rng.choice(NOUNS[manner])
    if mode == "details" and cast.gender != "they":
        return _details(rng, plot, slots, noun)
    if mode == "details":
        mode = "named_does"
    bare_noun = noun.partition(" ")[2]
    if mode in ("place", "bare"):
        pattern = rng.choice(_patterns()[mode])
        text = pattern.format(a=noun, s=bare_noun, in_a=slots["in_a"], in_the=slots["in_the"])
        asked: set[str] = {"place"} if mode == "place" else set()
    else:
        about, asked = SUBJECTS[mode](rng, cast, plot, slots)
        text = rng.choice(_patterns()["about"]).format(a=noun, s=bare_noun, about=about)
    return Request(_casual(rng, text), frozenset(asked))
