"""Lists: "Give me three tips for ...", and what people ask next (one more, which is best, the second one)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from training.talk.noise import finished, noisy, terse
from training.talk.smalltalk import said
from training.talk.templates import Turns, blocks, capital, chance, fill, pick, say, sections

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")


@dataclass(frozen=True)
class Topic:
    """One list: `thing`, `things` with what they are for, other ways to ask, and the items.

    For advice the items are sentences and `best` says why the first of them matters most.
    """

    thing: str
    things: str
    questions: tuple[str, ...]
    items: tuple[str, ...]
    best: str = ""


@cache
def topics() -> tuple[Topic, ...]:
    found = []
    for block in (*blocks("tips.txt"), *blocks("things.txt")):
        one, many, tail = (part.strip() for part in block["T"][0].split("|"))
        items = block.items if block["M"] else tuple(block.items[0].split("; "))
        best = block["M"][0] if block["M"] else ""
        found.append(Topic(f"{one} {tail}".strip(), f"{many} {tail}".strip(), block["Q"], items, best))
    return tuple(found)


@cache
def _families() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in sections("rhymes.txt")[""] if len(row.split()) > 3)


def rhyme_topic(rng: Random) -> Topic:
    family = pick(rng, _families())
    word = pick(rng, family)
    questions = (f"What rhymes with {word}?", f"Which words rhyme with {word}?", f"Find rhymes for {word}")
    items = tuple(other for other in family if other != word)
    return Topic(f"word that rhymes with {word}", f"words that rhyme with {word}", questions, items)


def letter_topic(rng: Random) -> Topic:
    letter, _, words = pick(rng, sections("letters.txt")[""]).partition(": ")
    verb = pick(rng, ("start", "begin"))
    name = letter.upper() if chance(rng, 0.7) else letter
    things = f"words that {verb} with [the letter |]{name}"
    questions = (f"Which words {verb} with {name}?", f"Words with {name}")
    return Topic(f"word that {verb}s with {name}", things, questions, tuple(words.split()))


def any_topic(rng: Random) -> Topic:
    roll = rng.random()
    if roll < 0.08:
        return rhyme_topic(rng)
    return letter_topic(rng) if roll < 0.14 else pick(rng, topics())


def spelled(rng: Random, count: int) -> str:
    return str(count) if chance(rng, 0.25) else NUMBERS[count]


def rendered(items: Sequence[str], numbered: bool) -> str:
    if numbered:
        return "\n".join(f"{index}. {capital(item)}" for index, item in enumerate(items, 1))
    return "\n".join(f"- {capital(item)}" for item in items)


def _chosen(rng: Random, topic: Topic, count: int) -> list[str]:
    """`count` items in any order; of advice always the one that matters most."""
    items = rng.sample(topic.items, count)
    if topic.best and topic.items[0] not in items:
        items[int(rng.random() * count)] = topic.items[0]
    return items


def in_a_sentence(rng: Random, topic: Topic, items: Sequence[str]) -> str:
    joined = ", ".join(items[:-1]) + " and " + items[-1]
    return capital(f"{NUMBERS[len(items)]} {fill(rng, topic.things)} are {joined}.")


def _answer(rng: Random, topic: Topic, items: Sequence[str], numbered: bool, free: bool) -> str:
    words = NUMBERS[len(items)]
    slots = {"n": words, "N": capital(words), "things": fill(rng, topic.things)}
    intro = say(rng, "lists short intros" if free else "lists intros", slots).strip("-")
    return (intro + "\n" if intro else "") + rendered(items, numbered)


def _request(rng: Random, topic: Topic, count: int) -> tuple[str, bool, bool]:
    """The user's words, whether the list is numbered, and whether its subject went unsaid as a phrase."""
    if topic.questions and chance(rng, 0.35):
        return fill(rng, pick(rng, topic.questions)), False, True
    things = fill(rng, topic.things)
    if chance(rng, 0.2):
        text = say(rng, "lists uncounted", {"things": things, "Things": capital(things)})
        return text, False, False
    number = spelled(rng, count)
    return say(rng, "lists counted", {"n": number, "N": capital(number), "things": things}), True, False


STYLES = ((" as a numbered list", True), (", numbered", True), (" with dashes", False))


def _styled(rng: Random, text: str, numbered: bool) -> tuple[str, bool]:
    if "please" in text or not chance(rng, 0.08):
        return text, numbered
    style, numbered = pick(rng, STYLES)
    mark = text[-1] if text[-1] in "?." else ""
    return text.rstrip("?.") + style + mark, numbered


def listing(rng: Random, topic: Topic) -> tuple[str, str, list[str]]:
    """One request, its answer, and the items that the answer lists."""
    count = min(pick(rng, (3, 3, 3, 4, 4, 5, 5, 2, 6)), len(topic.items) - 1)
    text, numbered, free = _request(rng, topic, count)
    if not numbered:
        count = min(pick(rng, (3, 4)), len(topic.items) - 1)
    items = _chosen(rng, topic, count)
    if numbered and not topic.best and chance(rng, 0.12):
        return noisy(rng, finished(text)), in_a_sentence(rng, topic, items), items
    text, numbered = _styled(rng, finished(text), numbered)
    return noisy(rng, text), _answer(rng, topic, items, numbered, free), items


def single(rng: Random, topic: Topic) -> Turns:
    """Just one item."""
    text = finished(say(rng, "lists one", {"thing": topic.thing}))
    item = pick(rng, topic.items)
    return [(noisy(rng, text), item if topic.best else capital(item) + ".")]


def _more(rng: Random, topic: Topic, items: list[str]) -> tuple[str, str] | None:
    left = [item for item in topic.items if item not in items]
    if not left:
        return None
    item = pick(rng, left)
    items.append(item)
    end = "" if topic.best else "."
    return say(rng, "lists more"), say(rng, "lists more answers", {"x": item + end})


def _best(rng: Random, topic: Topic, items: list[str]) -> tuple[str, str]:
    if topic.best:
        return say(rng, "lists best tip"), topic.best
    return say(rng, "lists best thing"), say(rng, "lists best answers", {"x": pick(rng, items)})


def _nth(rng: Random, topic: Topic, items: list[str]) -> tuple[str, str]:
    index = int(rng.random() * min(len(items), len(ORDINALS)))
    question = say(rng, "lists nth", {"o": ORDINALS[index]})
    return question, items[index] if topic.best else f"The {ORDINALS[index]} one was: {items[index]}."


def _how_many(rng: Random, topic: Topic, items: list[str]) -> tuple[str, str]:
    return say(rng, "lists how many"), f"I gave you {NUMBERS[len(items)]}."


def _first_two(rng: Random, topic: Topic, items: list[str]) -> tuple[str, str] | None:
    if len(items) < 3:
        return None
    del items[2:]
    return say(rng, "lists first two"), rendered(items, numbered=True)


FOLLOW_UPS = (_more, _more, _best, _best, _nth, _nth, _how_many, _first_two)


def list_once(rng: Random) -> Turns:
    topic = any_topic(rng)
    if chance(rng, 0.08):
        return single(rng, topic)
    return [listing(rng, topic)[:2]]


def list_chat(rng: Random) -> Turns:
    """A list and one to three things that people ask about it."""
    topic = any_topic(rng)
    user, answer, items = listing(rng, topic)
    turns = [(user, answer)]
    for follow_up in dict.fromkeys(rng.sample(FOLLOW_UPS, pick(rng, (1, 1, 2, 3)))):
        if turn := follow_up(rng, topic, items):
            turns.append((terse(rng, finished(turn[0])), turn[1]))
    if chance(rng, 0.2):
        turns.append(said(rng, "thanks"))
    return turns
