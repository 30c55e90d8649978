"""The authored questions and answers of training/qa: any training phrasing with any answer, and what follows.

A block has `Q:` phrasings for training, `H:` phrasings that are never trained on, `A:` answers and `K:` the
key facts: groups divided by "&", each with alternatives divided by "|"; one of each group must be said.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from training.talk.noise import asked_freely, contracted, terse
from training.talk.rephrase import content_words, rephrased
from training.talk.smalltalk import said
from training.talk.templates import Block, Sampler, Turn, Turns, blocks, chance, pick, say

FOLDER = Path(__file__).parent.parent / "qa"
FIRST_ASKED = "d_basics"
REPHRASED = 0.55
"""How often a question is asked in words that no phrasing of its block has."""
BEGIN, MOST_ALIKE = 5, 16
"""Names are alike that share their first letters; what more questions share is no name."""
NO_NAMES = frozenset({"with", "that", "much", "from", "called", "when", "have", "make", "about", "their"})


@dataclass(frozen=True, eq=False)
class Question:
    """One block, with the file it comes from."""

    topic: str
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    keys: str

    @property
    def shortest(self) -> str:
        return min(self.answers, key=len)


def _question(topic: str, block: Block) -> Question:
    return Question(topic, block["Q"], block["H"], block["A"], " & ".join(block["K"]))


@cache
def questions() -> tuple[Question, ...]:
    files = sorted(FOLDER.glob("*.txt"))
    found = (_question(path.stem, block) for path in files for block in blocks(path))
    return tuple(question for question in found if question.asked and question.answers)


@cache
def neighbors() -> dict[Question, tuple[Question, ...]]:
    """Questions by those about something with a like name: wheel and wheelbarrow, America and American."""
    groups: dict[str, list[Question]] = {}
    for one in questions():
        words = (word.lower() for word in content_words(one.asked[0]) if len(word) >= 4)
        for begin in sorted({word[:BEGIN] for word in words if word not in NO_NAMES}):
            groups.setdefault(begin, []).append(one)
    near: dict[Question, dict[Question, None]] = {one: {} for one in questions()}
    for group in groups.values():
        for one in group if len(group) <= MOST_ALIKE else ():
            near[one] |= dict.fromkeys(other for other in group if other is not one)
    return {one: tuple(others) for one, others in near.items()}


@cache
def by_topic(topic: str) -> tuple[Question, ...]:
    return tuple(question for question in questions() if question.topic == topic)


LETTERS = re.compile(r"[^a-z0-9]+")


def plain(text: str) -> str:
    """`text` without case, spaces and marks."""
    return LETTERS.sub("", text.lower())


@cache
def phrasings() -> frozenset[str]:
    """All authored phrasings, held out or not."""
    return frozenset(plain(text) for one in questions() for text in (*one.asked, *one.held_out))


def beside(sampler: Sampler) -> Sampler:
    """`sampler` without what asks an authored question, which has its own answers."""

    def sample(rng: Random) -> Turns:
        while True:
            turns = sampler(rng)
            if not any(len(user) < 150 and plain(user) in phrasings() for user, _ in turns):
                return turns

    return sample


@cache
def _key(option: str) -> re.Pattern[str]:
    """Where `option` is said: a short one only at the beginning of a word ("air", but not in "hair"), and a
    number only as a whole ("4", but not in "14" or "4,000")."""
    begins = r"(?<![a-z0-9])" if option[0].isalnum() and (len(option) <= 3 or option[0].isdigit()) else ""
    ends = r"(?![0-9]|[,.][0-9])" if option[-1].isdigit() else ""
    return re.compile(begins + re.escape(option) + ends)


def says(answer: str, keys: str) -> bool:
    """Does `answer` say one alternative of each group of `keys`? (any case)"""
    answer = answer.lower()
    groups = [group.split("|") for group in keys.lower().split("&")]
    return all(any(_key(option.strip()).search(answer) for option in group) for group in groups)


def asked(rng: Random, question: Question) -> Turn:
    """A phrasing of the question, often in other clothes, and one of its answers."""
    answer = pick(rng, question.answers)
    if chance(rng, REPHRASED):
        return terse(rng, rephrased(rng, question.asked, pick(rng, question.answers))), answer
    phrasing = pick(rng, question.asked)
    return asked_freely(rng, contracted(rng, phrasing) if chance(rng, 0.15) else phrasing), answer


def any_question(rng: Random) -> Question:
    """Any question, and a little more often one of those that everybody asks first."""
    return pick(rng, by_topic(FIRST_ASKED) if chance(rng, 0.06) else questions())


def question_once(rng: Random) -> Turns:
    return [asked(rng, any_question(rng))]


def _other_words(rng: Random, question: Question, answer: str) -> Turn | None:
    """The same in other words, or shorter; None where the block has no other answer."""
    others = [other for other in question.answers if other != answer]
    if answer != question.shortest and chance(rng, 0.5):
        return terse(rng, say(rng, "answers shorter")), question.shortest
    return (terse(rng, say(rng, "answers again")), pick(rng, others)) if others else None


def _second(rng: Random, first: Question) -> Question:
    """What may be asked next: about something with a like name, which has another answer, or near it."""
    near = neighbors()[first]
    if near and chance(rng, 0.5):
        return pick(rng, near)
    return pick(rng, by_topic(first.topic) if chance(rng, 0.6) else questions())


def question_chat(rng: Random) -> Turns:
    """A question; then it again in other words, a second question, doubt, or thanks."""
    question = any_question(rng)
    turns = [asked(rng, question)]
    if chance(rng, 0.4) and (turn := _other_words(rng, question, turns[0][1])):
        turns.append(turn)
    if chance(rng, 0.12):
        turns.append(said(rng, "truth"))
    if chance(rng, 0.6) or len(turns) == 1:
        second = _second(rng, question)
        if second is not question:
            turns.append(asked(rng, second))
    if chance(rng, 0.12):
        turns.append((terse(rng, say(rng, "answers first question")), f"You asked: {turns[0][0]}"))
    if chance(rng, 0.25):
        turns.append(said(rng, "thanks"))
    return turns
