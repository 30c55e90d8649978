"""A sentence as its parts, so that tense, negation, question and number are right by construction."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from training.talk.memory import names
from training.talk.templates import capital, chance, pick, sections

BE = {"i": ("am", "was"), "third": ("is", "was"), "many": ("are", "were")}
TIMES = {
    "present": ("every day", "every morning", "on Sundays", "every week", "every evening", "in the summer"),
    "past": (
        "yesterday",
        "yesterday",
        "last week",
        "last night",
        "last year",
        "two days ago",
        "an hour ago",
        "last summer",
        "yesterday morning",
        "on that day",
    ),
    "future": ("tomorrow", "next week", "soon", "next year", "tomorrow morning", "in an hour"),
}


@dataclass(frozen=True, slots=True)
class Subject:
    text: str
    person: str  # "i", "third" (he, she, it, one name) or "many" (you, we, they)
    pronoun: str
    human: bool


@dataclass(frozen=True, slots=True)
class Verb:
    """`base` is "" for the verb to be."""

    base: str
    third: str
    past: str
    ing: str


@dataclass(frozen=True, slots=True)
class Clause:
    subject: Subject
    verb: Verb
    rest: str
    tense: str = "present"
    negative: bool = False
    question: bool = False
    time: str = ""


TO_BE = Verb("", "is", "was", "being")


def third_person(base: str) -> str:
    if base == "have":
        return "has"
    if base.endswith(("s", "sh", "ch", "x", "o")):
        return base + "es"
    return base[:-1] + "ies" if base.endswith("y") and base[-2] not in "aeou" else base + "s"


@cache
def subjects() -> tuple[Subject, ...]:
    human = {word.replace("_", " ") for word in sections("clauses.txt")["people"][0].split()}
    rows = (row.split(" | ") for row in sections("clauses.txt")["subjects"])
    return tuple(Subject(text, person, pronoun, text in human) for text, person, pronoun in rows)


@cache
def people() -> tuple[Subject, ...]:
    return tuple(subject for subject in subjects() if subject.human)


@cache
def predicates() -> tuple[tuple[Verb, tuple[str, ...], bool], ...]:
    """A verb, what may follow it, and whether animals do it, too."""
    found = []
    for row in sections("clauses.txt")["predicates"]:
        forms, _, rests = row.partition(": ")
        base, past, ing = forms.lstrip("*").split()
        found.append(
            (Verb(base, third_person(base), past, ing), tuple(rests.split(" | ")), row.startswith("*"))
        )
    return tuple(found)


@cache
def states() -> tuple[str, ...]:
    return tuple(sections("clauses.txt")["states"][0].split(" | "))


def person_named(rng: Random) -> Subject:
    pronoun, pool = pick(rng, (("he", "boys"), ("she", "girls")))
    return Subject(pick(rng, names()[pool]), "third", pronoun, True)


def any_clause(rng: Random) -> Clause:
    """A plain sentence in the present; a quarter have a name as subject, a sixth the verb to be."""
    if chance(rng, 0.16):
        subject = person_named(rng) if chance(rng, 0.25) else pick(rng, subjects())
        return Clause(subject, TO_BE, pick(rng, states()))
    verb, rests, animals = pick(rng, predicates())
    subject = person_named(rng) if chance(rng, 0.25) else pick(rng, subjects() if animals else people())
    return Clause(subject, verb, pick(rng, rests))


def _be(clause: Clause) -> tuple[str, str]:
    """The finite verb (before the subject in questions) and what remains after the subject."""
    if clause.tense == "future":
        return "will", "be"
    return BE[clause.subject.person][clause.tense == "past"], ""


def _do(clause: Clause) -> tuple[str, str]:
    if clause.tense == "future":
        return "will", clause.verb.base
    third = clause.subject.person == "third"
    helper = "did" if clause.tense == "past" else "does" if third else "do"
    return helper, clause.verb.base


def finite(clause: Clause) -> str:
    """The verb of a plain statement: "goes", "went", "will go", "is"."""
    verb, third = clause.verb, clause.subject.person == "third"
    if clause.tense == "future":
        return f"will {verb.base or 'be'}"
    if not verb.base:
        return _be(clause)[0]
    return verb.past if clause.tense == "past" else verb.third if third else verb.base


def render(clause: Clause) -> str:
    """The sentence with its capital and its mark."""
    subject = clause.subject.text
    if not clause.question and not clause.negative:
        words = [subject, finite(clause), clause.rest, clause.time]
    else:
        helper, verb = _do(clause) if clause.verb.base else _be(clause)
        negation = "not" if clause.negative else ""
        front = [helper, subject] if clause.question else [subject, helper]
        words = [*front, negation, verb, clause.rest, clause.time]
    return capital(" ".join(word for word in words if word)) + ("?" if clause.question else ".")


def moved_to_front(clause: Clause) -> str:
    """The sentence with its word of time first: "Yesterday he went home." """
    plain = replace(clause, time="")
    text = render(plain)
    rest = text if clause.subject.text[0].isupper() else text[:1].lower() + text[1:]
    return f"{capital(clause.time)} {rest}"


def in_tense(rng: Random, clause: Clause, tense: str) -> Clause:
    """`clause` in `tense`, with a word of time that fits."""
    return replace(clause, tense=tense, time=pick(rng, TIMES[tense]))


def progressive(clause: Clause, be: str) -> str:
    words = (clause.subject.text, be, clause.verb.ing, clause.rest, "now")
    return capital(" ".join(word for word in words if word)) + "."


Change = Callable[[Clause], Clause]
CHANGES: dict[str, Change] = {
    "past": lambda clause: replace(clause, tense="past"),
    "future": lambda clause: replace(clause, tense="future"),
    "present": lambda clause: replace(clause, tense="present"),
    "negative": lambda clause: replace(clause, negative=True, question=False),
    "question": lambda clause: replace(clause, question=True, negative=False),
    "positive": lambda clause: replace(clause, negative=False, question=False),
}
