"""Things the user tells and asks about later: "My name is Anna." ... "What is my name?"."""

from collections.abc import Callable
from functools import cache
from random import Random

from training.talk.noise import finished
from training.talk.smalltalk import said
from training.talk.templates import Block, Turn, Turns, blocks, chance, fill, pick, say, sections

# Never in the corpus: the held-out chats introduce themselves with these.
HELD_OUT_NAMES = ("Bertil", "Tamsin", "Orla", "Radek", "Imogen", "Kasper", "Philippa", "Ronan", "Sunniva")
ONSETS = (*"bcdfghjklmnprstvwyz", "br", "ch", "cl", "dr", "gr", "kr", "ph", "sh", "st", "th", "tr", "wh")
VOWELS = (*"aeiouaeiouy", "ai", "ee", "ia", "ie", "ei", "oa", "ou", "au")
CODAS = (*[""] * 8, *"lnrmsdktx", "ll", "nn", "ra", "rt", "nd", "lf", "ck", "sk", "th")
CORRECTABLE = frozenset(
    {"name", "color", "food", "dog", "cat", "friend", "number", "season", "hobby", "sport"}
)


@cache
def names() -> dict[str, tuple[str, ...]]:
    rows = (row.partition(": ") for row in sections("names.txt")[""])
    lists = {key: tuple(words.split()) for key, _, words in rows}
    return lists | {"names": lists["girls"] + lists["boys"]}


def made_up(rng: Random) -> str:
    """A name that nobody has, so that names are copied and not guessed."""
    first = "" if chance(rng, 0.25) else pick(rng, ONSETS)
    rest = [pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(pick(rng, (0, 1, 1, 2)))]
    name = (first + pick(rng, VOWELS) + "".join(rest) + pick(rng, CODAS)).capitalize()
    return made_up(rng) if name in HELD_OUT_NAMES or len(name) < 3 else name


def made_up_word(rng: Random) -> str:
    """A word that nobody knows; it takes the article "a"."""
    word = made_up(rng).lower()
    return word if word[0] not in "aeiouh" else made_up_word(rng)


@cache
def _values(block: Block) -> tuple[str, ...]:
    return tuple(block["V"][0].split(" | "))


def value_of(rng: Random, block: Block) -> str:
    value = pick(rng, _values(block))
    if not value.startswith("@"):
        return value
    return made_up(rng) if chance(rng, 0.6) else pick(rng, names()[value[1:]])


@cache
def things() -> tuple[Block, ...]:
    """All things that can be told; the name many times, since it is told most often."""
    found = blocks("memory.txt")
    return (found[0],) * 12 + found[1:]


def told(rng: Random, block: Block, value: str) -> Turn:
    statement = fill(rng, pick(rng, block["S"]), {"v": value})
    user = finished(statement) if chance(rng, 0.8) else statement
    return user, fill(rng, pick(rng, block["A"]), {"v": value})


def asked(rng: Random, block: Block, value: str | None) -> Turn:
    """The question, with its answer or (when nothing was told) the honest one."""
    question = fill(rng, pick(rng, block["Q"]))
    if chance(rng, 0.15):
        question = question.lower().rstrip("?")
    answer = pick(rng, block["U"]) if value is None else fill(rng, pick(rng, block["R"]), {"v": value})
    return question, answer


def _corrected(rng: Random, block: Block, value: str) -> Turn:
    user = say(rng, "memory corrections", {"v": value})
    return finished(user), say(rng, "memory corrected", {"v": value})


def _both(rng: Random, first: Block, second: Block, one: str, two: str) -> Turn:
    """Two things told at once."""
    left = fill(rng, pick(rng, first["S"][:1]), {"v": one})
    right = fill(rng, pick(rng, second["S"]), {"v": two})
    joint = right if right.startswith(("I ", "I'", two)) else right[:1].lower() + right[1:]
    text = f"{left} and {joint}." if ". " not in right else f"{left}. {right}."
    return text, fill(rng, pick(rng, second["A"]), {"v": two})


def _opening(rng: Random, known: dict[str, str]) -> tuple[Turns, list[Block]]:
    """One or two things told, in one turn or two; `known` is filled."""
    first = pick(rng, things())
    known[first.tag] = one = value_of(rng, first)
    if chance(rng, 0.55):
        return [told(rng, first, one)], [first]
    second = pick(rng, [block for block in things() if block.tag != first.tag])
    two = value_of(rng, second)
    while two == one:
        two = value_of(rng, second)
    known[second.tag] = two
    if chance(rng, 0.5):
        return [_both(rng, first, second, one, two)], [first, second]
    return [told(rng, first, one), told(rng, second, two)], [first, second]


def _goodbye(rng: Random, known: dict[str, str]) -> Turn:
    tag = pick(rng, ("bye", "thanks"))
    user, answer = said(rng, tag)
    return user, say(rng, f"memory {tag}", {"v": known["name"]}) if "name" in known else answer


def remembering(rng: Random, middle: Callable[[Random], Turns]) -> Turns:
    """Something is told, something else may happen (`middle`), and then it is asked for."""
    known: dict[str, str] = {}
    turns, blocks_told = _opening(rng, known)
    block = blocks_told[-1]
    if len(turns) == 1 and block.tag in CORRECTABLE and chance(rng, 0.08):
        known[block.tag] = value_of(rng, block)
        turns.append(_corrected(rng, block, known[block.tag]))
    if chance(rng, 0.6):
        turns += middle(rng)
    for block in rng.sample(blocks_told, pick(rng, (1, len(blocks_told)))):
        turns.append(asked(rng, block, known[block.tag]))
    if chance(rng, 0.15):
        other = pick(rng, things())
        turns.append(asked(rng, other, known.get(other.tag)))
    if chance(rng, 0.2):
        turns.append(_goodbye(rng, known))
    return turns


def unknown(rng: Random) -> Turns:
    """Asked for something that was never told; then perhaps told, and asked again."""
    block = pick(rng, things())
    turns = [asked(rng, block, None)]
    if chance(rng, 0.5):
        value = value_of(rng, block)
        turns += [told(rng, block, value), asked(rng, block, value)]
    return turns
