"""Changes of one sentence: tense, negation, question, plural, opposite, politeness, length, mistakes.

Every answer is right by construction: a wrong sentence is made from a right one, a long one from a short
one, and a clause is rendered twice.
"""

import re
from dataclasses import replace
from functools import cache
from random import Random

from training.talk.clauses import CHANGES, Clause, Subject, any_clause, person_named, render
from training.talk.mistakes import correction, nouns
from training.talk.noise import finished, terse
from training.talk.smalltalk import said
from training.talk.templates import Turns, capital, chance, pairs, pick, request, say, sections


def _changed(rng: Random) -> tuple[Clause, Clause, str]:
    """A clause, one change, and the changed clause."""
    clause = any_clause(rng)
    if chance(rng, 0.4):
        clause = replace(clause, tense=pick(rng, ("past", "future")))
    if chance(rng, 0.12):
        clause = replace(clause, negative=True)
    kind = pick(rng, tuple(CHANGES))
    changed = CHANGES[kind](clause)
    while changed == clause:
        kind = pick(rng, tuple(CHANGES))
        changed = CHANGES[kind](clause)
    return clause, changed, kind


def changes(rng: Random) -> Turns:
    """One change of a clause, and in a third of all cases one or two more of the result."""
    clause, changed, kind = _changed(rng)
    turns = [(request(rng, kind, render(clause)), render(changed))]
    for _ in range(pick(rng, (0, 0, 0, 1, 1, 2))):
        kind = pick(rng, tuple(CHANGES))
        after = CHANGES[kind](changed)
        if after != changed:
            turns.append((terse(rng, finished(say(rng, f"now {kind}"))), render(after)))
            changed = after
    return turns


def spelling(rng: Random) -> Turns:
    """A sentence with one misspelled word."""
    words, _, sentence = pick(rng, sections("misspelled.txt")[""]).partition(" | ")
    right, *wrongs = words.split()
    wrong = pick(rng, wrongs)
    capitals = right.capitalize() in sentence
    old, new = (right.capitalize(), wrong.capitalize()) if capitals else (right, wrong)
    return [(request(rng, "spelling", re.sub(rf"\b{old}\b", new, sentence)), sentence)]


def politeness(rng: Random) -> Turns:
    blunt, kind = pick(rng, pairs("polite.txt"))
    if blunt.startswith("* "):
        blunt, kind = blunt[2:], say(rng, "rewrite frames", {"x": kind})
    shown = blunt[:-1] + "!" if blunt.endswith(".") and chance(rng, 0.2) else blunt
    return [(request(rng, "polite", shown), kind)]


OPTIONAL = re.compile(r"\(([^()]*)\)")


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip().replace(" .", ".").replace(" ,", ",")
    return capital(text)


def both_lengths(rng: Random, line: str) -> tuple[str, str]:
    """The sentence with all that may go (or most of it), and without."""
    line = line.replace("{name}", person_named(rng).text)
    kept = rng.random() if chance(rng, 0.5) else 1.0
    long = OPTIONAL.sub(lambda match: match[1] if rng.random() <= kept else "", line)
    return _tidy(long), _tidy(OPTIONAL.sub("", line))


def length(rng: Random) -> Turns:
    """Shorter by its details, or longer by them."""
    line = pick(rng, sections("shorten.txt")[""])
    long, short = both_lengths(rng, line)
    while long == short:
        long, short = both_lengths(rng, line)
    if chance(rng, 0.25):
        return [(request(rng, "long", short), long)]
    return [(request(rng, "short", long), short)]


@cache
def _described() -> tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]:
    rows = (row.split(" | ") for row in sections("sentence_pairs.txt")["describe"])
    return tuple((noun, tuple(tuple(word.split("/")) for word in words)) for noun, *words in rows)


def _is(noun: str, past: bool = False) -> str:
    many = noun.endswith(("s", "children"))
    return ("were" if many else "was") if past else ("are" if many else "is")


def opposite(rng: Random) -> Turns:
    noun, groups = pick(rng, _described())
    pair = [group for group in groups if len(group) == 2]
    if not pair:
        return opposite(rng)
    one, other = rng.sample(pick(rng, pair), 2)
    verb = _is(noun, chance(rng, 0.25))
    return [(request(rng, "opposite", capital(f"{noun} {verb} {one}.")), capital(f"{noun} {verb} {other}."))]


def _two_people(rng: Random) -> tuple[Subject, Subject]:
    one, two = person_named(rng), person_named(rng)
    while one.text == two.text:
        two = person_named(rng)
    return one, two


def joining(rng: Random) -> Turns:
    """Two sentences with one subject, or with one predicate."""
    if chance(rng, 0.6):
        noun, groups = pick(rng, _described())
        first, second = (pick(rng, group) for group in rng.sample(groups, 2))
        verb, pronoun = _is(noun), "They" if _is(noun) == "are" else "It"
        again = pronoun if chance(rng, 0.4) and noun not in ("the man", "the girl") else capital(noun)
        text = f"{capital(noun)} {verb} {first}. {again} {verb} {second}."
        return [(request(rng, "join", text), f"{capital(noun)} {verb} {first} and {second}.")]
    one, two = _two_people(rng)
    clause = replace(any_clause(rng), subject=one, tense=pick(rng, ("present", "past")))
    both = replace(one, text=f"{one.text} and {two.text}", person="many")
    text = f"{render(clause)} {render(replace(clause, subject=two))}"
    return [(request(rng, "join", text), render(replace(clause, subject=both)))]


STATES = ("tired", "hungry", "small", "big", "old", "young", "brown", "black", "fast", "quiet")
WHERE = ("", " in the garden", " in the barn", " near the river")


def pluralized(rng: Random) -> Turns:
    """ "The cat sleeps." as "The cats sleep." """
    one, many = pick(rng, nouns("animals"))
    third, base = pick(rng, sections("sentence_pairs.txt")["do"]).split()
    if chance(rng, 0.4):
        state = pick(rng, STATES)
        third, base = f"is {state}", f"are {state}"
    where = "" if base.startswith("are") else pick(rng, WHERE)
    return [(request(rng, "plural", f"The {one} {third}{where}."), f"The {many} {base}{where}.")]


def repetition(rng: Random) -> Turns:
    clause = replace(
        any_clause(rng), tense=pick(rng, ("present", "past", "future")), negative=chance(rng, 0.1)
    )
    sentence = render(clause)
    return [(request(rng, "repeat", sentence), sentence)]


def pronouns(rng: Random) -> Turns:
    subject = person_named(rng)
    clause = replace(any_clause(rng), subject=subject, tense=pick(rng, ("present", "past", "future")))
    changed = replace(clause, subject=replace(subject, text=subject.pronoun))
    return [(request(rng, "pronoun", render(clause)), render(changed))]


TASKS = (
    changes, changes, changes, *((correction,) * 12), spelling, spelling, politeness, politeness, length,
    length, opposite, joining, pluralized, pronouns, repetition,
)  # fmt: skip


def rewriting(rng: Random) -> Turns:
    """One change of a sentence; sometimes another, sometimes thanks."""
    task = pick(rng, TASKS)
    turns = task(rng)
    if task is not changes and chance(rng, 0.12):
        turns += pick(rng, TASKS[3:])(rng)
    if chance(rng, 0.06):
        turns.append(said(rng, "thanks"))
    return turns
