"""Who and what a story is about, and the words that stand for them in every sentence."""

import random
from dataclasses import dataclass
from functools import cache

from training.stories import words
from training.stories.grammar import an, capital, joined
from training.stories.words import Kind, Place, Thing

PRONOUNS = {
    "m": ("he", "him", "his", "himself"),
    "f": ("she", "her", "her", "herself"),
    "they": ("they", "them", "their", "themselves"),
}
TRAITS = ("cheerful", "curious", "friendly", "gentle", "kind", "lively", "merry", "thoughtful", "busy")
SIZED_TRAITS = {"small": ("little", "tiny", "small"), "big": ("big", "great big", "huge")}
FOODS = {
    "wild": ("berries", "nuts", "apple slices", "warm mushroom soup", "plums"),
    "farm": ("warm bread", "apples", "carrot soup", "pancakes", "sweet corn"),
    "sea": ("seaweed rolls", "sea grass soup", "sea berries"),
    "snow": ("warm soup", "hot berry pie", "warm oat cakes"),
    "jungle": ("mangoes", "bananas", "sweet melon slices"),
    "desert": ("sweet dates", "figs", "cool melon slices"),
    "space": ("star cookies", "warm moon soup", "space pancakes"),
    "sky": ("sweet dew", "cloud cakes", "sugar rain"),
    "any": ("warm bread", "apple pie", "pancakes", "vegetable soup", "cookies", "buns with jam"),
}
TIMES = ("One morning", "One day", "One afternoon", "Early one morning", "One fine day", "One quiet morning")
ELDERS = ("grandmother", "grandfather", "aunt", "uncle")


@dataclass(frozen=True, slots=True)
class Friend:
    kind: Kind
    name: str
    gender: str


@dataclass(frozen=True, slots=True)
class Cast:
    """The choices that one story keeps from its first word to its last."""

    kind: Kind
    names: tuple[str, ...]
    gender: str  # "m", "f" or "they"
    trait: str
    thing: Thing
    adjective: str
    place: Place
    place_adjective: str
    friend: Friend

    @property
    def name(self) -> str:
        return joined(self.names)


def helper_kinds(zone: str, hero: Kind) -> list[Kind]:
    """Kinds that may be the friend of `hero` in `zone`."""
    return [
        kind
        for kind in words.kinds().values()
        if zone in kind.zones
        and not kind.tags & {"odd", "plural"}
        and kind.word not in hero.word
        and hero.word not in kind.word
    ]


@cache
def _helpers(zone: str, hero: Kind, eats: bool, tags: frozenset[str]) -> tuple[Kind, ...]:
    kinds = helper_kinds(zone, hero)
    return tuple(k for k in kinds if tags <= k.tags and not (eats and "noeat" in k.tags))


def choose_friend(
    rng: random.Random,
    hero: Kind,
    gender: str,
    zone: str,
    taken: tuple[str, ...],
    eats: bool,
    tags: frozenset[str],
) -> Friend:
    """A friend of the other gender, so that "he" and "she" are never in doubt."""
    friend_gender = {"m": "f", "f": "m"}.get(gender) or rng.choice("mf")
    kinds = _helpers(zone, hero, eats, tags) or _helpers(zone, hero, False, frozenset())
    kind = rng.choice([k for k in kinds if k.gender in ("x", friend_gender)])
    name = rng.choice(words.names()[friend_gender])
    while any(name in other or other in name for other in taken) or name.lower() in kind.word:
        name = rng.choice(words.names()[friend_gender])
    return Friend(kind, name, friend_gender)


def choose_names(rng: random.Random, kind: Kind) -> tuple[tuple[str, ...], str]:
    """Names for the hero, and "m", "f" or "they"."""
    gender = kind.gender if kind.gender != "x" else rng.choice("mf")
    pool = words.names()[gender]
    if kind.n_names == 1:
        name = rng.choice(pool)
        while name.lower() in kind.word:
            name = rng.choice(pool)
        return (name,), gender
    if kind.gender == "x":
        pool = words.names()[rng.choice("mf")] + words.names()[rng.choice("mf")]
    chosen: list[str] = []
    while len(chosen) < kind.n_names:
        name = rng.choice(pool)
        if not any(name in other or other in name for other in chosen):
            chosen.append(name)
    return tuple(chosen), "they"


def choose_trait(rng: random.Random, kind: Kind) -> str:
    sized = [trait for tag, traits in SIZED_TRAITS.items() if tag in kind.tags for trait in traits]
    return rng.choice(sized) if sized and rng.random() < 0.4 else rng.choice(TRAITS)


def with_trait(kind: Kind, trait: str) -> str:
    """ "a curious fox", "two curious mice"."""
    if kind.n_names == 1:
        return an(kind.word if trait in kind.word else f"{trait} {kind.word}")
    count, _, noun = kind.word.partition(" ")
    return f"{count} {trait} {noun}" if noun else f"{trait} {count}"


def _hero_slots(rng: random.Random, cast: Cast) -> dict[str, str]:
    kind, plural = cast.kind, cast.gender == "they"
    he, him, his, himself = PRONOUNS[cast.gender]
    speech = {"i": "we", "me": "us", "my": "our", "mine": "ours", "am": "are", "myself": "ourselves"}
    if not plural:
        speech = {"i": "I", "me": "me", "my": "my", "mine": "mine", "am": "am", "myself": "myself"}
    return speech | {
        "n": cast.name,
        "ns": cast.name + "'s",
        "k": rng.choice(kind.later),
        "kind": kind.word,
        "a_kind": kind.word if plural else an(kind.word),
        "tk": with_trait(kind, cast.trait),
        "trait": cast.trait,
        "he": he,
        "him": him,
        "his": his,
        "himself": himself,
        "hers": {"her": "hers", "their": "theirs"}.get(his, his),
        "v": cast.name if kind.n_names < 3 else "my friends",
        "pl": "s" if plural else "",
        "was": "were" if plural else "was",
        "is": "are" if plural else "is",
        "has": "have" if plural else "has",
        "does": "do" if plural else "does",
        "s": "" if plural else "s",
        "es": "" if plural else "es",
        "ies": "y" if plural else "ies",
        "home": kind.home,
        "went": kind.move.went,
        "ran": kind.move.ran,
        "go": kind.move.go,
        "run": kind.move.run,
    }


def _friend_slots(friend: Friend) -> dict[str, str]:
    he, him, his, himself = PRONOUNS[friend.gender]
    word = friend.kind.word
    return {
        "fn": friend.name,
        "fns": friend.name + "'s",
        "fk": f"the {word}",
        "fkind": word,
        "afk": an(word),
        "af": f"{an(word)} named {friend.name}",
        "fi": f"{an(word)} named {friend.name}"
        if friend.kind.tags & {"child"}
        else f"{friend.name} the {word}",
        "fhe": he,
        "fhim": him,
        "fhis": his,
        "fhimself": himself,
        "fhome": friend.kind.home,
    }


def _place_slots(place: Place, adjective: str) -> dict[str, str]:
    full = an(f"{adjective} {place.noun}") if adjective else f"the {place.noun}"
    return {
        "place": f"the {place.noun}",
        "in_a": f"{place.before} {full}",
        "in_the": f"{place.before} the {place.noun}",
        "a_place": full,
    }


def foods(kind: Kind, zone: str) -> tuple[str, ...]:
    human_zone = zone if zone in FOODS else "any"
    return FOODS[human_zone]


def base_slots(rng: random.Random, cast: Cast) -> dict[str, str]:
    """Every slot that stays the same through the story, small and (with "^") capital."""
    thing, zone = cast.thing, cast.place.zone
    full = f"{cast.adjective} {thing.noun}" if cast.adjective else thing.noun
    spots = words.spots()[zone]
    first = rng.randrange(len(spots))
    time = rng.choice(TIMES)
    food = foods(cast.kind, zone)
    first_food = rng.randrange(len(food))
    slots = _hero_slots(rng, cast) | _friend_slots(cast.friend)
    slots |= _place_slots(cast.place, cast.place_adjective)
    slots |= {
        "o": f"the {thing.noun}",
        "o_full": f"the {full}",
        "noun": thing.noun,
        "adj": cast.adjective,
        "ao": an(full),
        "ano": an(thing.noun),
        "spot": spots[first],
        "spot2": spots[(first + 1 + rng.randrange(len(spots) - 1)) % len(spots)],
        "food": food[first_food],
        "food2": food[(first_food + 1) % len(food)],
        "once": rng.choice(("one day", "one day", "one spring day", "one autumn day")),
        "time": time,
        "time_low": time[:1].lower() + time[1:],
        "elder": "teacher" if "noeat" in cast.kind.tags else rng.choice(ELDERS),
    }
    return add_capitals(slots)


def add_capitals(slots: dict[str, str]) -> dict[str, str]:
    slots.update([("^" + key, capital(value)) for key, value in slots.items() if key[0] != "^"])
    return slots
