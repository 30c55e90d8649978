"""Reads plots from plots/*.txt.

A plot is a header of `key: value` rows and then its beats. Values with alternatives part them by " | ".

    plot: lost_and_found
    objects: any              any (all that can be carried and keeps, also "any -tag"), tags (light signal),
                              or nouns (=tooth =star)
    zones: all                all, land, or a list; where the hero may live
    needs: / without:         tags that the hero must have / must not have
    helper: small             tags that the friend must have
    plural: yes               the plot also works with plural heroes
    end: keeps                who has the object in the end: keeps, gives, shared, gone, away
    colors: no                no extra sentence about the hero at the start (it could contradict)
    traits: shy | quiet       the hero's trait, where the plot depends on it
    asks: lose{s} {ano}       what a request may say after "who"
    themes: losing things     what a request may say after "a story about"
    problem, reason, solution, ending, lesson, start, finish     the facts, as phrases (see facts.py)
    pick cause, cure          one row is chosen for each story; columns part by " / " and become slots
    - there was a hole in {his} bag / mended the bag
    open / close / after      the plot's own openings, closings, and first sentences of the sequel
    beat, beat?, beat~        a beat; may be left out; may change places with its neighbors marked ~
    para                      a new paragraph

A row "- ..." is one to three sentences; its `[one|another]` choices are expanded. Write the hero as {h}
(name, "the fox" or a pronoun, as fits; once in a row), as {t} (never a pronoun: after speech, as an object)
or {n} (the name), then {he} {him} {his} {hers} {himself}, {was} {is} {has}, {s} {es} {ies} after a present
verb and {pl} after a noun for plural heroes; when the hero speaks, {i} {me} {my} {mine} {am} {myself}; the
friend as {f} (introduced the first time; once in a row), {fn}, {fs}, {fns}, {fhe} {fhim} {fhis}, or {af}
("an owl named Olive", for strangers); the object as {ao} at first, then {o}, {ano}, {noun}; also {spot},
{spot2}, {in_the}, {home}, {food}, {time} ("One morning") and {time_low}, {elder}, {went} {ran}; {sad} and
{glad} are the feelings chosen from `start` and `finish`. A sentence capitalizes itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from training.stories import words
from training.stories.grammar import Lines, compile_line

PLOTS = Path(__file__).parent / "plots"
END_STATES = frozenset({"keeps", "gives", "shared", "gone", "away"})
PHRASES = ("problem", "reason", "solution", "ending", "lesson", "start", "finish")


@dataclass(frozen=True, slots=True)
class Beat:
    """One step of a plot. `lines` holds the authored sentences, each with all its expansions."""

    lines: tuple[Lines, ...]
    optional: bool = False
    free: bool = False
    paragraph: bool = False


@dataclass(frozen=True, slots=True)
class Pick:
    slots: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plot:
    name: str
    objects: tuple[str, ...]
    zones: frozenset[str]
    needs: frozenset[str]
    without: frozenset[str]
    helper: frozenset[str]
    plural: bool
    colors: bool
    stranger: bool  # the friend is introduced by the plot
    end: str
    traits: tuple[str, ...]
    asks: tuple[str, ...]
    themes: tuple[str, ...]
    phrases: dict[str, tuple[str, ...]]
    picks: tuple[Pick, ...]
    opens: tuple[Lines, ...]
    beats: tuple[Beat, ...]
    closes: tuple[Lines, ...]
    afters: tuple[Lines, ...]


@dataclass(slots=True)
class _Draft:
    header: dict[str, str] = field(default_factory=dict)
    blocks: list[tuple[str, list[str]]] = field(default_factory=list)


def _drafts(text: str) -> list[_Draft]:
    drafts: list[_Draft] = []
    for row in filter(None, map(str.strip, text.splitlines())):
        if row.startswith("#"):
            continue
        if row.startswith("plot:"):
            drafts.append(_Draft())
        draft = drafts[-1]
        if row.startswith("- "):
            draft.blocks[-1][1].append(row[2:].strip())
        elif ":" in row:
            key, value = row.split(":", 1)
            draft.header[key] = value.strip()
        else:
            draft.blocks.append((row, []))
    return drafts


def _options(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(" | ")) if value else ()


def _objects(value: str) -> tuple[str, ...]:
    if value.startswith("any"):
        without = {"big", "odd", "food", "crop"} | set(value.replace("-", "").split())
        return tuple(t.noun for t in words.things().values() if not t.tags & without)
    asked = value.split(", ") if "," in value else value.split()
    nouns = [noun.removeprefix("=").strip() for noun in asked if noun.startswith("=")]
    tags = {tag for tag in asked if not tag.startswith("=")}
    return tuple(t.noun for t in words.things().values() if t.noun in nouns or t.tags & tags)


def _zones(value: str) -> frozenset[str]:
    named = {"all": words.ZONES, "land": words.LAND}
    return named[value] if value in named else frozenset(value.split())


def _compiled(rows: Iterable[str]) -> tuple[Lines, ...]:
    return tuple(compile_line(row) for row in rows)


def _plot(draft: _Draft) -> Plot:
    header, beats, picks = draft.header, [], []
    own: dict[str, list[str]] = {"open": [], "close": [], "after": []}
    paragraph = False
    for name, rows in draft.blocks:
        if name == "para":
            paragraph = True
        elif name.startswith("pick "):
            cells = tuple(tuple(cell.strip() for cell in row.split(" / ")) for row in rows)
            slots = tuple(slot.strip() for slot in name[5:].split(","))
            assert all(len(row) == len(slots) for row in cells), (header["plot"], name)
            picks.append(Pick(slots, cells))
        elif name in own:
            own[name] += rows
        else:
            assert name.startswith("beat") and rows, (header["plot"], name)
            beats.append(Beat(_compiled(rows), "?" in name, "~" in name, paragraph))
            paragraph = False
    assert header["end"] in END_STATES, header["plot"]
    return Plot(
        name=header["plot"],
        objects=_objects(header["objects"]),
        zones=_zones(header["zones"]),
        needs=frozenset(header.get("needs", "").split()),
        without=frozenset(header.get("without", "").split()),
        helper=frozenset(header.get("helper", "").split()),
        plural=header.get("plural") == "yes",
        colors=header.get("colors") != "no",
        stranger=any(line.introduces for beat in beats for group in beat.lines for line in group),
        end=header["end"],
        traits=_options(header.get("traits", "")),
        asks=_options(header["asks"]),
        themes=_options(header["themes"]),
        phrases={key: _options(header[key]) for key in PHRASES},
        picks=tuple(picks),
        opens=_compiled(own["open"]),
        beats=tuple(beats),
        closes=_compiled(own["close"]),
        afters=_compiled(own["after"]),
    )


@cache
def plots() -> dict[str, Plot]:
    """Every plot by its name."""
    found = {}
    for path in sorted(PLOTS.glob("*.txt")):
        for draft in _drafts(path.read_text(encoding="ascii")):
            plot = _plot(draft)
            assert plot.name not in found, plot.name
            found[plot.name] = plot
    return found


@cache
def sections(name: str) -> dict[str, tuple[Lines, ...]]:
    """Shared lines of data/`name`: sections "[key]" with "- " rows."""
    found: dict[str, list[str]] = {}
    key = ""
    for row in words.rows(name):
        if row.startswith("[") and row.endswith("]"):
            key = row[1:-1]
            found[key] = []
        else:
            found[key].append(row.removeprefix("- "))
    return {key: _compiled(rows) for key, rows in found.items()}
