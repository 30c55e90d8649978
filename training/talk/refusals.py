"""What the model cannot know or do, and inputs that make no sense."""

from collections.abc import Callable
from functools import cache
from random import Random

from training.talk.answers import questions
from training.talk.memory import made_up, made_up_word, names
from training.talk.noise import finished, noisy
from training.talk.smalltalk import reply, said, tagged
from training.talk.templates import COMMANDS, Block, Turn, Turns, blocks, chance, fill, pick, say

KEYS = ("asdf", "qwer", "jkl", "zxcv", "hjk", "fgh", "uio", "dfg", "lkj", "bnm", "wer", "sdf", "ghj")
WORDS = ("banana", "seven", "of", "the", "lamp", "blue", "under", "run", "ninety", "cup", "then", "if")
DIGITS = "0123456789"
FACTS = frozenset({"person", "place", "history", "science", "recipe", "facts"})
EXPLAINED = frozenset(
    {"sums", "person", "place", "history", "science", "code", "translation", "essay", "facts"}
)


def big_sum(rng: Random) -> str:
    """A sum beyond twenty."""
    top = pick(rng, (50, 100, 1000))
    first, second = (12 + int(rng.random() * top) for _ in range(2))
    sign, word = pick(rng, (("+", "plus"), ("-", "minus")))
    if sign == "-":
        first = max(21, first) + second
    return f"{first} {sign if chance(rng, 0.7) else word} {second}"


def big_product(rng: Random) -> str:
    first, second = (3 + int(rng.random() * 30) for _ in range(2))
    return f"{first} {pick(rng, ('*', 'times', 'x', 'divided by', '/'))} {second}"


def somebody(rng: Random) -> str:
    """A person of two names whom nobody knows."""
    first = pick(rng, names()["names"])
    return f"{first} {made_up(rng)}"


MADE: dict[str, Callable[[Random], str]] = {
    "@sum": big_sum,
    "@product": big_product,
    "@person": somebody,
    "@town": made_up,
    "@word": made_up_word,
}


@cache
def known_words() -> str:
    """All that the authored questions ask about, in one text."""
    return "\n".join(text for question in questions() for text in question.asked).lower()


@cache
def _things(block: Block) -> tuple[str, ...]:
    """What a block asks for, less what the model has learned to answer."""
    things = tuple(block["X"][0].split(" | "))
    if block.tag not in FACTS:
        return things
    return tuple(thing for thing in things if thing.lower() not in known_words())


def _refused(rng: Random, block: Block) -> Turn:
    thing = pick(rng, _things(block))
    slots = COMMANDS | {"x": MADE[thing](rng) if thing in MADE else thing}
    question = finished(fill(rng, pick(rng, block["Q"]), slots))
    return noisy(rng, question), fill(rng, pick(rng, block["A"]), slots)


@cache
def _refusals() -> tuple[Block, ...]:
    return tuple(block for block in blocks("refusals.txt") if block.tag != "crisis")


def crisis(rng: Random) -> Turns:
    """Somebody is in danger; always a conversation of its own."""
    return [_refused(rng, tagged("refusals.txt", "crisis"))]


def refusal(rng: Random) -> Turns:
    """Asked for too much; then perhaps why, or what else."""
    block = pick(rng, _refusals())
    turns = [_refused(rng, block)]
    if block.tag == "harm":
        return turns
    if chance(rng, 0.12) and block.tag in EXPLAINED:
        turns.append((say(rng, "refusals next"), say(rng, "refusals reasons")))
    if chance(rng, 0.12):
        turns.append((say(rng, "refusals others"), say(rng, "refusals able")))
    return turns


def gibberish(rng: Random) -> str:
    """Keys hit at random, loose words, or digits."""
    roll = rng.random()
    if roll < 0.5:
        text = "".join(pick(rng, KEYS) for _ in range(1 + int(rng.random() * 3)))
        return text if chance(rng, 0.7) else text + " " + pick(rng, KEYS)
    if roll < 0.8:
        return " ".join(rng.sample(WORDS, 3))
    return "".join(pick(rng, DIGITS) for _ in range(4 + int(rng.random() * 5)))


def odd(rng: Random) -> Turns:
    """Gibberish, silence, insults, other languages, attempts to change the rules."""
    if chance(rng, 0.25):
        return [(gibberish(rng), pick(rng, tagged("odd.txt", "gibberish")["A"]))]
    block = pick(rng, [block for block in blocks("odd.txt") if block["Q"]])
    if block.tag in ("foreign", "empty"):
        return [(fill(rng, pick(rng, block["Q"])), fill(rng, pick(rng, block["A"])))]
    turns = [reply(rng, block)]
    if block.tag == "insult" and chance(rng, 0.15):
        turns.append(said(rng, "sorry"))
    return turns
