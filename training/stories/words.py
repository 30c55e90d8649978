"""The word lists under data/, read once: kinds of heroes, names, objects, places and ways to move."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
LAND = frozenset({"wild", "farm", "town", "home", "shore", "castle", "snow", "jungle", "desert"})
ZONES = LAND | {"sea", "space", "sky"}


@dataclass(frozen=True, slots=True)
class Move:
    """Ways to move: "walked", "ran", "walk", "run"."""

    went: str
    ran: str
    go: str
    run: str


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A kind of hero. For a plural hero `word` is "two mice", `later` are the ways to say "the mice"."""

    word: str
    zones: tuple[str, ...]
    home: str
    move: Move
    gender: str  # "m", "f", or "x" (either)
    tags: frozenset[str]
    later: tuple[str, ...]
    n_names: int = 1


@dataclass(frozen=True, slots=True)
class Thing:
    noun: str
    adjectives: tuple[str, ...]
    tags: frozenset[str]


@dataclass(frozen=True, slots=True)
class Place:
    noun: str
    before: str  # "in", "by", ...
    adjectives: tuple[str, ...]  # empty: there is only one ("the sea")
    zone: str


def rows(name: str) -> list[str]:
    """The lines of a data file that say something."""
    lines = (line.strip() for line in (DATA / name).read_text(encoding="ascii").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _cells(row: str, separator: str = "|") -> list[str]:
    return [cell.strip() for cell in row.split(separator)]


@cache
def moves() -> dict[str, Move]:
    return {key: Move(*forms) for key, *forms in map(_cells, rows("moves.txt"))}


def _kind(row: str, zones: list[str], move: str) -> Kind:
    word, home, *extras = _cells(row, ",")
    tags, gender, zones = set(), "x", list(zones)
    for extra in extras:
        if extra in moves():
            move = extra
        elif extra in ("m", "f"):
            gender = extra
        elif extra.startswith("@"):
            zones.append(extra[1:])
        else:
            tags.add(extra.removeprefix("+"))
    return Kind(word, tuple(zones), home, moves()[move], gender, frozenset(tags), (f"the {word}",))


def _plural(row: str) -> Kind:
    word, later, n_names, zones, home, move, tags = _cells(row)
    gender = n_names[1:] or "x"
    forms = tuple(_cells(later, ","))
    kind_tags = frozenset(tags.split()) | {"plural"}
    return Kind(
        word, tuple(zones.split()), home, moves()[move], gender, kind_tags, forms, n_names=int(n_names[0])
    )


@cache
def kinds() -> dict[str, Kind]:
    """Every kind by its word, singular and plural."""
    found: dict[str, Kind] = {}
    zones, move = ["wild"], "walk"
    for row in rows("kinds.txt"):
        if header := re.fullmatch(r"\[(.*); (\w+)\]", row):
            zones, move = header[1].split(), header[2]
        else:
            kind = _kind(row, zones, move)
            found[kind.word] = kind
    for row in rows("plurals.txt"):
        kind = _plural(row)
        found[kind.word] = kind
    return found


@cache
def names() -> dict[str, tuple[str, ...]]:
    """Names for "m" and "f"; each holds the names that fit both as well."""
    found: dict[str, tuple[str, ...]] = {}
    key = ""
    for row in rows("names.txt"):
        if row.startswith("["):
            key = row[1:-1]
        else:
            found[key] = (*found.get(key, ()), *row.split())
    return {gender: found[gender] + found["x"] for gender in "mf"}


@cache
def things() -> dict[str, Thing]:
    found = {}
    for row in rows("objects.txt"):
        noun, adjectives, tags = _cells(row)
        found[noun] = Thing(noun, tuple(_cells(adjectives, ",")), frozenset(tags.split()))
    return found


@cache
def places() -> dict[str, tuple[Place, ...]]:
    """Places by zone."""
    found: dict[str, tuple[Place, ...]] = {}
    for row in rows("places.txt"):
        noun, before, adjectives, zone = _cells(row)
        place = Place(noun, before, () if adjectives == "-" else tuple(_cells(adjectives, ",")), zone)
        found[zone] = (*found.get(zone, ()), place)
    return found


@cache
def spots() -> dict[str, tuple[str, ...]]:
    """Where a thing may lie, by zone: "under a fern"."""
    return {zone: tuple(spot) for zone, *spot in map(_cells, rows("spots.txt"))}


def unknown_kind(word: str) -> Kind:
    """A hero that no list knows, told in the most general way."""
    zones = ("wild", "town", "farm")
    return Kind(word, zones, "home", moves()["walk"], "x", frozenset({"odd"}), (f"the {word}",))


def unknown_thing(noun: str) -> Thing:
    return Thing(noun, ("little", "old", "pretty"), frozenset())
