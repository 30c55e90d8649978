"""A question in other words: another frame ("Why do cats purr?", "How come cats purr?"), other words, fewer words.

A small model takes a question for what it is only when it has met it in many clothes. What comes out is what a
user types, so it need not be perfect English.
"""

import re
from collections.abc import Sequence
from functools import cache
from random import Random

from training.talk.frames import reframed, turned_around
from training.talk.noise import FUNCTION_WORDS, lower_first
from training.talk.templates import capital, chance, fill, pick, sections

ASKING = frozenset({"what", "which", "who", "whose", "why", "how", "where", "when", "many", "much"})
WORD = re.compile(r"[a-z]+")
CONTENT = re.compile(r"[A-Za-z0-9'-]{3,}")


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """Words by the words that may stand for them."""
    groups = [
        tuple(row.replace("_", " ") for row in line.split()) for line in sections("rephrase.txt")["words"]
    ]
    found: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for word in group:
            found[word] = (*found.get(word, ()), *(other for other in group if other != word))
    return found


def with_synonyms(rng: Random, text: str) -> str:
    """`text` with about half of the words replaced that have a synonym."""

    def other(match: re.Match[str]) -> str:
        options = synonyms().get(match[0])
        return pick(rng, options) if options and chance(rng, 0.5) else match[0]

    text = WORD.sub(other, text)
    text = re.sub(r"\ba (?=[aeio])", "an ", text)
    return re.sub(r"\ban (?=[bcdfgjklmnpqrstvwxyz])", "a ", text)


def content_words(text: str) -> list[str]:
    return [word for word in CONTENT.findall(text) if word.lower() not in FUNCTION_WORDS]


def clue(rng: Random, question: str, answer: str) -> str:
    """Some words of the question and of its answer, as one types into a search box."""
    words = content_words(question)
    chosen = rng.sample(words, min(len(words), pick(rng, (1, 2))))
    about = content_words(answer)
    chosen += rng.sample(about, min(len(about), pick(rng, (1, 2, 3))))
    return " ".join(dict.fromkeys(word.lower() for word in chosen)) or question


def about_fact(rng: Random, answer: str) -> str:
    """A question that says a part of the answer: "Tell me about this: a foal can stand up"."""
    parts = [part.strip() for part in re.split(r"[.,:;!?]", answer) if len(part.split()) >= 3]
    if not parts:
        return answer
    return capital(
        fill(rng, pick(rng, sections("rephrase.txt")["fact"]), {"x": lower_first(pick(rng, parts))})
    )


def fewer_words(rng: Random, text: str) -> str:
    """`text` without one or two of its words, after the first; what asks (why, how, where) stays."""
    words = text.split()
    for _ in range(pick(rng, (1, 1, 2))):
        loose = [at for at in range(1, len(words)) if words[at].lower() not in ASKING]
        if len(words) > 3 and loose:
            words.pop(pick(rng, loose))
    return " ".join(words)


def rephrased(rng: Random, phrasings: Sequence[str], answer: str) -> str:
    """One of the phrasings of a question in other clothes; `answer` is one that it may get."""
    roll = rng.random()
    shuffled = rng.sample(phrasings, len(phrasings))
    if roll < 0.08:
        return clue(rng, shuffled[0], answer)
    if roll < 0.13:
        return about_fact(rng, answer)
    text = _reworded(rng, shuffled, answer) if roll < 0.92 else shuffled[0]
    text = with_synonyms(rng, text) if chance(rng, 0.4) else text
    return fewer_words(rng, text) if chance(rng, 0.08) else text


def _reworded(rng: Random, phrasings: Sequence[str], answer: str) -> str:
    """The first of the phrasings that can be asked in another frame, in that; else the first."""
    if chance(rng, 0.12):
        turned = (turned_around(rng, question, answer) for question in phrasings)
        if text := next((text for text in turned if text), None):
            return text
    others = (reframed(rng, question) for question in phrasings)
    return next((other for other in others if other), phrasings[0])
