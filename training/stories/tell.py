"""Tells one story: chooses a line for every beat and keeps the hero and the object in sight."""

import random
import re
from dataclasses import dataclass, field

from training.stories.cast import Cast, base_slots
from training.stories.facts import add_picks, facts_of
from training.stories.grammar import Line, Lines, capital, sentences
from training.stories.plotfile import Beat, Plot, sections

STYLES = ("plain", "bedtime", "funny", "adventure", "short")
OPTIONAL = {"middle": 0.25, "long": 0.95}  # how often an optional beat is told
BOUNDS = {"short": (60, 90), "middle": (85, 215), "long": (150, 250)}  # words
TRIES = 100
CROWD_STARTS = re.compile(r'(^"?|[.!?]"? "?)the ')
WORD = re.compile(r"[A-Za-z'-]+")


@dataclass(frozen=True, slots=True)
class Told:
    """A finished story with the slots that it was told with."""

    text: str
    summary: str
    sequel: str
    facts: dict[str, str]


@dataclass(slots=True)
class _Page:
    """What has been written so far, and whether each sentence named the hero."""

    rng: random.Random
    slots: dict[str, str]
    friend_forms: tuple[str, str, str, str]  # two introductions, the name, "the owl"
    paragraphs: list[list[str]] = field(default_factory=lambda: [[]])
    named: list[bool] = field(default_factory=list)
    introduced: bool = False
    pronouns: bool = True
    crowd: str = ""  # "Pip and Dot and Olive", too many names in a row
    names: str = ""  # of three heroes: said in full only where `full`, else "the mice"
    full: bool = True
    teaches: bool = False  # the lesson was asked for, so it must be said


def _write(page: _Page, line: Line) -> None:
    rng, slots = page.rng, page.slots
    kind = slots["k"]
    name = slots["n"] if not page.names else page.names if page.full else kind
    if page.names:
        slots["n"], slots["^n"] = name, capital(name)
    slots["t"] = name if rng.random() < 0.7 else kind
    slots["o"] = slots["o_full"] if rng.random() < 0.12 else slots["o_plain"]
    pronoun = False
    if line.smart:
        pronoun = page.pronouns and page.named[-1] and rng.random() < 0.35
        slots["h"] = slots["he"] if pronoun else name if rng.random() < 0.75 else kind
        slots["hs"] = slots["his"] if pronoun else slots["ns"]
        slots["^hs"], slots["^h"] = capital(slots["hs"]), capital(slots["h"])
    slots["^t"] = capital(slots["t"])
    slots["^o"] = "T" + slots["o"][1:]
    if line.friend:
        first, second, friend, friend_kind = page.friend_forms
        if page.introduced:
            slots["f"] = friend if rng.random() < 0.7 else friend_kind
        else:
            slots["f"] = first if line.spoken or rng.random() < 0.5 else second
        slots["fs"] = slots["f"] + "'s"
        slots["^f"], slots["^fs"] = capital(slots["f"]), capital(slots["fs"])
        page.introduced = True
    page.introduced = page.introduced or line.introduces
    text = line.text.format_map(slots)
    if page.crowd and page.crowd in text:  # "Pip and Dot and Olive": "the mice and Olive"
        text = (" " + text).replace(" " + page.crowd, f" {kind} and {slots['fn']}").strip()
        text = CROWD_STARTS.sub(lambda match: match[1] + "The ", text)
    page.paragraphs[-1].append(text)
    for mark in line.marks:
        page.named.append(mark.named or (mark.smart and not pronoun))


def _choose(rng: random.Random, lines: tuple[Lines, ...]) -> Line:
    group = lines[int(rng.random() * len(lines))]
    return group[int(rng.random() * len(group))]


def _ordered(rng: random.Random, beats: tuple[Beat, ...], optional: float) -> list[Beat]:
    """The beats to tell; neighbors marked as free may change places."""
    told = [beat for beat in beats if not beat.optional or rng.random() < optional]
    for index in range(len(told) - 1):
        if told[index].free and told[index + 1].free and rng.random() < 0.5:
            told[index], told[index + 1] = told[index + 1], told[index]
    return told


def _open(page: _Page, plot: Plot, style: str, length: str) -> None:
    rng, openings = page.rng, sections("openings.txt")
    key = "short" if length == "short" else style
    own = plot.opens and style == "plain" and length != "short" and rng.random() < 0.3
    _write(page, _choose(rng, plot.opens if own else openings[key]))
    colors = sections("colors.txt")
    if plot.colors and not own and length != "short" and rng.random() < (0.7 if style != "plain" else 0.35):
        line = _choose(rng, colors[style])
        while plot.stranger and ("{fn}" in line.text or line.friend):
            line = _choose(rng, colors[style])
        page.introduced = page.introduced or "{fn}" in line.text
        _write(page, line)


def _body(page: _Page, plot: Plot, length: str) -> None:
    page.full = False
    beats = _ordered(page.rng, plot.beats, OPTIONAL[length])
    for index, beat in enumerate(beats):
        if beat.paragraph or (index == 0 and len(page.named) > 1):
            page.paragraphs.append([])
        page.pronouns = index < len(beats) - 1
        _write(page, _choose(page.rng, beat.lines))


def _close(page: _Page, plot: Plot, style: str, length: str) -> None:
    rng, closings = page.rng, sections("closings.txt")
    page.pronouns = False
    page.full = True
    if length != "short":
        page.paragraphs.append([])
    if (length != "short" and rng.random() < 0.35) or page.teaches:
        _write(page, _choose(rng, sections("morals.txt")["any"]))
    chance = rng.random()
    if style in closings and chance < 0.5:
        lines = closings[style]
    elif plot.closes and chance < 0.7:
        lines = plot.closes
    else:
        lines = closings[plot.end] if chance < 0.9 else closings["any"]
    _write(page, _choose(rng, lines))


def n_words(text: str) -> int:
    return len(text.split())


def hero_forms(cast: Cast) -> tuple[str, ...]:
    """The ways in which a sentence may name the hero: "Ruby", "the fox", "The fox"."""
    return (cast.name, *cast.kind.later, *map(capital, cast.kind.later))


def hero_stays(told: list[str], forms: tuple[str, ...], noun: str) -> bool:
    """Is the hero (one of `forms`) named in half of the sentences, never out of sight for three, and in
    the last two, and the object near the end?"""
    named = [any(form in sentence for form in forms) for sentence in told]
    gap = any(not (a or b or c) for a, b, c in zip(named, named[1:], named[2:], strict=False))
    thing = any(noun in sentence for sentence in told[-3:])
    return not gap and thing and 2 * sum(named) >= len(named) and named[-1] and named[-2]


def repeats(text: str, told: list[str]) -> bool:
    """Does a sentence come twice, or a run of four words more than three times?"""
    if len(set(told)) < len(told):
        return True
    words = WORD.findall(text.lower())
    counts: dict[tuple[str, ...], int] = {}
    for run in zip(words, words[1:], words[2:], words[3:], strict=False):
        counts[run] = counts.get(run, 0) + 1
        if counts[run] > 3:
            return True
    return False


def _page(rng: random.Random, cast: Cast, slots: dict[str, str]) -> _Page:
    name, kind = slots["fn"], slots["fk"]
    known = slots["af"] if cast.friend.kind.tags & {"child"} else f"{name} {kind}"
    friendly = known if known == slots["af"] else f"{slots['his']} friend {known}"
    page = _Page(rng, dict(slots), (known, friendly, name, kind))
    if len(cast.names) > 1:
        page.crowd = f"{cast.name} and {name}"
    if len(cast.names) > 2:
        page.names = cast.name
    return page


def _text(page: _Page) -> str:
    return "\n\n".join(" ".join(paragraph) for paragraph in page.paragraphs if paragraph)


def _story(
    rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str], style: str, length: str, teaches: bool
) -> str:
    page = _page(rng, cast, slots)
    page.teaches = teaches
    _open(page, plot, style, length)
    if length == "short":
        _write(page, _choose(rng, sections("brief.txt")["any"]))
    else:
        _body(page, plot, length)
    if length != "short" or sum(map(n_words, page.paragraphs[0])) < 72:
        _close(page, plot, style, length)
    text = _text(page)
    if length == "short":
        text = _compact(text, cast, slots)
    low, high = BOUNDS[length]
    if not low <= n_words(text) <= high:
        return ""
    if slots["fi" if length == "short" else "fn"] not in text:  # the sequel speaks of the friend
        return ""
    told = sentences(text)
    enough = text.count(cast.thing.noun) >= (2 if length == "short" else 3)
    good = enough and hero_stays(told, hero_forms(cast), cast.thing.noun) and not repeats(text, told)
    return text if good else ""


def name_once(text: str, full: str, short: str) -> str:
    """`text` with every "Olive the owl" after the first one shortened to "Olive"."""
    if full not in text:
        return text
    first = text.find(full) + len(full)
    head, tail = text[:first], text[first:]
    for begins in (". ", '"', "! "):
        tail = tail.replace(begins + full, begins + capital(short))
    return head + tail.replace(full, short)


def _compact(text: str, cast: Cast, slots: dict[str, str]) -> str:
    """A text made of facts, with the friend and plural heroes introduced only once, and "a lantern" first."""
    text = name_once(text, slots["fi"], slots["fn"])
    if cast.gender == "they":
        text = name_once(text, cast.name, slots["k"]).replace(f"{slots['k']}'s", slots["his"])
    first = text.find(cast.thing.noun)
    if text[:first].endswith("the "):
        text = text[: first - 4] + slots["ao"] + text[first + len(cast.thing.noun) :]
    return text


def _sequel(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> str:
    """What happened next: the plot's own first sentences, an event, and a quiet end; 60 to 120 words."""
    lines = sections("sequels.txt")
    for _ in range(TRIES):
        page = _page(rng, cast, slots)
        page.introduced = True
        page.pronouns = False
        for group in (plot.afters, lines[plot.end], lines["end"]):
            page.full = group is plot.afters
            _write(page, _choose(rng, group))
        text = _text(page)
        if 60 <= n_words(text) <= 120 and not repeats(text, sentences(text)):
            return text
    raise RuntimeError(f"no sequel fits: {plot.name}")


def _summary(rng: random.Random, cast: Cast, slots: dict[str, str]) -> str:
    text = _choose(rng, sections("summaries.txt")["any"]).text.format_map(slots)
    return _compact(text, cast, slots)


def tell_story(
    rng: random.Random,
    cast: Cast,
    plot: Plot,
    style: str,
    length: str,
    lesson: str = "",
    placed: bool = False,
) -> Told:
    """A story of `plot` with `cast`; style is plain, bedtime, funny or adventure; length one of BOUNDS.

    A `lesson` is said in so many words, and where `placed`, the place is named.
    Now and then long names leave no room for a very short story; then it is a middle one."""
    for attempt in range(2 * TRIES):
        slots = base_slots(rng, cast)
        slots["o_plain"] = slots["o"]
        add_picks(rng, cast, plot, slots)
        if lesson:
            slots["lesson"], slots["^lesson"] = lesson, capital(lesson)
        length = length if attempt < TRIES else "middle"
        text = _story(rng, cast, plot, slots, style, length, bool(lesson))
        said = lesson.lower() in text.lower() and (not placed or cast.place.noun in text)
        if text and said:
            return Told(text, _summary(rng, cast, slots), _sequel(rng, cast, plot, slots), facts_of(slots))
    raise RuntimeError(f"no story fits: {plot.name}, {style}, {length}")
