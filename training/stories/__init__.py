"""Short stories for children, told by programs: a request and its story, with the facts behind it.

    >>> import random
    >>> story = sample(random.Random(7))
    >>> story.request, story.text, story.facts["problem"], story.summary, story.sequel

`sample` draws a story for training and never one of `HELD_OUT`; `sample_about` tells a story of a given
hero, object or plot, known or not, for the held-out prompts. The words are in data/*.txt, the plots in
plots/*.txt (plotfile.py says how they are written), the forms of the facts in facts.py.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cache

from training.stories import words
from training.stories.cast import Cast, base_slots, choose_friend, choose_names, choose_trait
from training.stories.plotfile import Plot, plots
from training.stories.request import MODES, compose
from training.stories.tell import tell_story
from training.stories.words import Kind, Thing

__all__ = ["HELD_OUT", "MODES", "Story", "sample", "sample_about"]

PLURAL_SHARE = 0.08  # of the stories for training
NATURAL_SHARE = 0.7  # of the objects of heroes of the sea are such as one finds in the sea
MANNERS = {  # what is asked for: (weight, style, lengths to choose from)
    "plain": (46, "plain", ("middle", "middle", "middle", "long")),
    "bedtime": (14, "bedtime", ("middle", "middle", "long")),
    "funny": (8, "funny", ("middle",)),
    "adventure": (8, "adventure", ("middle", "long")),
    "short": (8, "plain", ("short",)),
    "brief": (10, "plain", ("short", "middle", "middle")),
    "long": (6, "plain", ("long",)),
}
_MANNER_NAMES = tuple(MANNERS)
_MANNER_WEIGHTS = tuple(weight for weight, _, _ in MANNERS.values())


@dataclass(frozen=True, slots=True)
class Story:
    """A request and the story that answers it. `object` is None where the request names none;
    `asked` says what the request names: kind, name, object, place, friend, plot, lesson."""

    request: str
    text: str
    hero: str
    hero_name: str
    object: str | None
    place: str
    plot: str
    style: str
    asked: frozenset[str]
    facts: dict[str, str]
    summary: str
    sequel: str


def _held_out(hero: str, other: str) -> bool:
    return zlib.crc32(f"{hero}|{other}".encode()) % 25 == 0


# Pairs (hero, object) and (hero, plot) that no training story combines: 4 % of each.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (kind, other) for kind in words.kinds() for other in (*words.things(), *plots()) if _held_out(kind, other)
)


def _suits(kind: Kind, plot: Plot) -> bool:
    return (
        bool(plot.zones & set(kind.zones))
        and plot.needs <= kind.tags
        and not plot.without & kind.tags
        and (plot.plural or "plural" not in kind.tags)
    )


@cache
def _plots_of(kind: Kind) -> tuple[Plot, ...]:
    return tuple(p for p in plots().values() if _suits(kind, p) and (kind.word, p.name) not in HELD_OUT)


@cache
def _things_of(kind: Kind, plot: Plot, natural: bool) -> tuple[Thing, ...]:
    things = [words.things()[noun] for noun in plot.objects if (kind.word, noun) not in HELD_OUT]
    fitting = [thing for thing in things if "sea" in thing.tags]
    return tuple(fitting if natural and fitting else things)


@cache
def _heroes(plural: bool) -> tuple[Kind, ...]:
    return tuple(kind for kind in words.kinds().values() if ("plural" in kind.tags) == plural)


def _choose_zone(rng: random.Random, kind: Kind, plot: Plot) -> str:
    zones = [zone for zone in kind.zones if zone in plot.zones]
    if not zones:  # only when a request forces the pair
        zones = [zone for zone in kind.zones if zone in words.LAND] or list(kind.zones)
    return zones[0] if rng.random() < 0.4 else rng.choice(zones)


def _make_cast(rng: random.Random, kind: Kind, plot: Plot, thing: Thing) -> Cast:
    zone = _choose_zone(rng, kind, plot)
    place = rng.choice(words.places()[zone])
    names, gender = choose_names(rng, kind)
    eats = "noeat" in plot.without
    return Cast(
        kind=kind,
        names=names,
        gender=gender,
        trait=rng.choice(plot.traits) if plot.traits else choose_trait(rng, kind),
        thing=thing,
        adjective=rng.choice(thing.adjectives) if rng.random() < 0.88 else "",
        place=place,
        place_adjective=rng.choice(place.adjectives) if place.adjectives else "",
        friend=choose_friend(rng, kind, gender, zone, names, eats, plot.helper),
    )


def kind_is_many(cast: Cast) -> bool:
    """Three heroes: their names alone would fill a very short story."""
    return len(cast.names) > 2


def _tell(rng: random.Random, cast: Cast, plot: Plot, must: str | None) -> Story:
    manner = rng.choices(_MANNER_NAMES, _MANNER_WEIGHTS)[0]
    _, style, lengths = MANNERS[manner]
    request = compose(rng, cast, plot, base_slots(rng, cast), manner, must)
    length = rng.choice(lengths)
    if length == "short" and kind_is_many(cast):
        length = "middle"
    told = tell_story(rng, cast, plot, style, length, request.lesson, "place" in request.asked)
    return Story(
        request=request.text,
        text=told.text,
        hero=cast.kind.word,
        hero_name=cast.name,
        object=cast.thing.noun if "object" in request.asked else None,
        place=told.facts["place"],
        plot=plot.name,
        style=manner,
        asked=request.asked,
        facts=told.facts,
        summary=told.summary,
        sequel=told.sequel,
    )


def sample(rng: random.Random) -> Story:
    """A story for training."""
    kind = rng.choice(_heroes(rng.random() < PLURAL_SHARE))
    plot = rng.choice(_plots_of(kind))
    natural = kind.zones[0] in ("sea", "sky") and rng.random() < NATURAL_SHARE
    things = _things_of(kind, plot, natural) or _things_of(kind, plot, False)
    if not things:
        return sample(rng)
    return _tell(rng, _make_cast(rng, kind, plot, rng.choice(things)), plot, None)


def sample_about(
    rng: random.Random,
    hero: str | None = None,
    obj: str | None = None,
    plot: str | None = None,
    mode: str | None = None,
) -> Story:
    """A story about what is named, also where it is held out or unknown; `mode` is a key of MODES, how
    much the request says. A plot that does not suit the hero or the object is an error of the caller."""
    if hero:
        kind = words.kinds().get(hero) or words.unknown_kind(hero)
    else:
        kind = rng.choice([k for k in _heroes(False) if not plot or _suits(k, plots()[plot])])
    thing = words.things().get(obj) or words.unknown_thing(obj) if obj else None
    choices = [plots()[plot]] if plot else [p for p in plots().values() if _suits(kind, p)]
    if thing and not plot:
        choices = [p for p in choices if thing.noun in p.objects] or [
            p for p in choices if len(p.objects) > 99
        ]
    chosen = rng.choice(choices)
    thing = thing or words.things()[rng.choice(chosen.objects)]
    return _tell(rng, _make_cast(rng, kind, chosen, thing), chosen, mode)
