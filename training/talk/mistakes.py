"""Sentences with a mistake and the right ones: verbs, tenses, articles, plurals, small words, capitals, marks.

A wrong sentence is always made from the right one: by a clause rendered twice, or by a row of mistakes.txt in
which `<wrong=right>` says what differs. What is asked for is the right sentence and nothing else.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random

from training.talk.clauses import (
    BE,
    Clause,
    any_clause,
    in_tense,
    moved_to_front,
    person_named,
    progressive,
    render,
)
from training.talk.templates import (
    Turn,
    Turns,
    article,
    capital,
    chance,
    fill,
    pairs,
    pick,
    request,
    say,
    sections,
)

Pair = tuple[str, str]  # a wrong sentence and the right one
MARK = re.compile(r"<([^<>=]*)=([^<>=]*)>")
STATES = frozenset({"like", "love", "have", "know", "need", "want"})  # verbs that have no "is ...ing"
MODALS = ("can", "must", "should", "will", "may")
REGULAR_PAST = re.compile(r"(?<=[^aeiou])y$|e$")


def _either_place(rng: Random, clauses: tuple[Clause, Clause]) -> Pair:
    """Both rendered, in a third of all cases with the word of time at the front."""
    if chance(rng, 0.35) and clauses[0].time:
        return moved_to_front(clauses[0]), moved_to_front(clauses[1])
    return render(clauses[0]), render(clauses[1])


def _as_person(clause: Clause, person: str) -> Clause:
    return replace(clause, subject=replace(clause.subject, person=person))


def wrong_agreement(rng: Random, clause: Clause) -> Pair:
    """ "She go to school every day." """
    clause = in_tense(rng, clause, "present")
    if not clause.verb.base:
        person = pick(rng, [person for person in BE if BE[person][0] != BE[clause.subject.person][0]])
        return _either_place(rng, (_as_person(clause, person), clause))
    other = "many" if clause.subject.person == "third" else "third"
    return _either_place(rng, (_as_person(clause, other), clause))


def wrong_past(rng: Random, clause: Clause) -> Pair:
    """ "She go to school yesterday.", "Yesterday he goes home." """
    right = in_tense(rng, clause, "past")
    wrong = replace(right, tense="present")
    if clause.verb.base:
        wrong = _as_person(wrong, pick(rng, ("many", "many", clause.subject.person)))
    return _either_place(rng, (wrong, right))


def wrong_was(rng: Random, clause: Clause) -> Pair:
    """ "We was late yesterday." """
    if clause.verb.base:
        return wrong_past(rng, clause)
    right = in_tense(rng, clause, "past")
    return _either_place(rng, (_as_person(right, "many" if right.subject.person != "many" else "i"), right))


def regular(base: str) -> str:
    """ "goed", "catched": the past that a child would make."""
    return REGULAR_PAST.sub(lambda match: "i" if match[0] == "y" else "", base) + "ed"


def wrong_form(rng: Random, clause: Clause) -> Pair:
    """ "He catched the ball." """
    right = in_tense(rng, clause, "past") if chance(rng, 0.5) else replace(clause, tense="past")
    if not clause.verb.base or regular(clause.verb.base) == clause.verb.past:
        return wrong_past(rng, clause)
    wrong = replace(right, verb=replace(clause.verb, past=regular(clause.verb.base)))
    return _either_place(rng, (wrong, right))


def wrong_do(rng: Random, clause: Clause) -> Pair:
    """ "He do not like apples.", "Do she like apples?" """
    question = chance(rng, 0.4)
    right = replace(clause, negative=not question, question=question)
    return render(_as_person(right, "many" if clause.subject.person == "third" else "third")), render(right)


def wrong_did(rng: Random, clause: Clause) -> Pair:
    """ "Did she went home?", "She did not went home." """
    question = chance(rng, 0.5)
    right = replace(clause, tense="past", negative=not question, question=question)
    return render(replace(right, verb=replace(clause.verb, base=clause.verb.past))), render(right)


def _around(clause: Clause, *words: str) -> str:
    """The subject, `words`, and the rest of the clause."""
    return capital(" ".join(word for word in (clause.subject.text, *words, clause.rest) if word)) + "."


def wrong_modal(rng: Random, clause: Clause) -> Pair:
    """ "He can sings.", "She must to go home.", "They will went home." """
    verb, modal = clause.verb, pick(rng, MODALS)
    wrong = pick(rng, (verb.third, f"to {verb.base}", verb.past)) if verb.base else pick(rng, ("is", "to be"))
    return _around(clause, modal, wrong), _around(clause, modal, verb.base or "be")


@cache
def participles() -> dict[str, str]:
    rows = (row.split() for row in sections("mistakes.txt")["participles"])
    return {row[0]: row[1] for row in rows}


def wrong_perfect(rng: Random, clause: Clause) -> Pair:
    """ "She has went home.", "They has seen the lake." """
    third = clause.subject.person == "third"
    has, other = ("has", "have") if third else ("have", "has")
    verb = clause.verb
    right = participles().get(verb.base, verb.past) if verb.base else "been"
    wrong = verb.past if right != verb.past and verb.base else verb.base
    if not wrong or chance(rng, 0.3):
        return _around(clause, other, right), _around(clause, has, right)
    return _around(clause, has, wrong), _around(clause, has, right)


def missing_be(rng: Random, clause: Clause) -> Pair:
    """ "She going home now.", "She is go home now.", "They is going home now." """
    if not clause.verb.base or clause.verb.base in STATES:
        return wrong_agreement(rng, clause)
    be = BE[clause.subject.person][0]
    right, roll = progressive(clause, be), rng.random()
    if roll < 0.4:
        return progressive(clause, ""), right
    if roll < 0.7:
        return progressive(replace(clause, verb=replace(clause.verb, ing=clause.verb.base)), be), right
    return progressive(clause, "is" if be != "is" else "are"), right


def missing_marks(rng: Random, clause: Clause) -> Pair:
    """No capital, no mark at the end, or neither."""
    clause = replace(clause, tense=pick(rng, ("present", "past")), question=chance(rng, 0.3))
    right = render(in_tense(rng, clause, clause.tense) if chance(rng, 0.4) else clause)
    roll = rng.random()
    if roll < 0.3:
        return right[0].lower() + right[1:], right
    return right.rstrip(".?") if roll < 0.5 else right.lower().rstrip(".?"), right


BY_CLAUSE: tuple[Callable[[Random, Clause], Pair], ...] = (
    *((wrong_past,) * 5), *((wrong_agreement,) * 4), wrong_form, wrong_form, wrong_was, wrong_do, wrong_do,
    wrong_did, wrong_did, wrong_modal, wrong_modal, wrong_perfect, wrong_perfect, missing_be, missing_be,
    missing_marks, missing_marks,
)  # fmt: skip


def by_clause(rng: Random) -> Pair:
    return pick(rng, BY_CLAUSE)(rng, any_clause(rng))


@cache
def nouns(heading: str) -> tuple[Pair, ...]:
    """Nouns, singular and plural."""
    rows = (row.split() for row in sections("sentence_pairs.txt")[heading])
    return tuple((one, many) for one, many in rows)


def _framed(rng: Random, heading: str, wrong: str, right: str) -> Pair:
    """A sentence of phrases.txt around what differs."""
    slots, template = {"n": person_named(rng).text}, pick(rng, sections("phrases.txt")[heading])
    return fill(rng, template, slots | {"x": wrong}), fill(rng, template, slots | {"x": right})


def wrong_article(rng: Random) -> Pair:
    """ "There is an dog on the table.", "I saw owl in the garden." """
    one, _ = pick(rng, nouns("nouns"))
    right = article(one)
    swapped = f"a {one}" if right.startswith("an ") else f"an {one}"
    return _framed(rng, "rewrite saw", pick(rng, (swapped, swapped, one)), right)


def wrong_plural(rng: Random) -> Pair:
    one, many = pick(rng, nouns("nouns"))
    count = pick(rng, ("two", "three", "four", "five", "many", "ten"))
    regular_form = one + "s" if many not in (one + "s", one) else one
    wrong = pick(rng, (one, regular_form)) if one != many else one + "s"
    return _framed(rng, "rewrite many", f"{count} {wrong}", f"{count} {many}")


def _tidy(text: str) -> str:
    return re.sub(r" +", " ", text).strip().replace(" ,", ",")


@cache
def _choices() -> dict[str, tuple[str, ...]]:
    headings = {"d": "days", "m": "months", "l": "lands", "e": "tongues"}
    return {key: tuple(sections("mistakes.txt")[heading][0].split()) for key, heading in headings.items()}


def marked(rng: Random) -> Pair:
    """A row of mistakes.txt with its choices made."""
    slots = {key: pick(rng, words) for key, words in _choices().items()} | {"n": person_named(rng).text}
    text = fill(rng, pick(rng, sections("mistakes.txt")["marked"]), slots)
    wrong = MARK.sub(lambda match: pick(rng, match[1].split("/")), text)
    return _tidy(wrong), capital(_tidy(MARK.sub(lambda match: match[2], text)))


def _carelessly(rng: Random, wrong: str) -> str:
    """A wrong sentence is often typed without its capitals or its mark at the end, too."""
    roll = rng.random()
    if roll < 0.25 and not wrong.startswith("I "):
        wrong = wrong[0].lower() + wrong[1:]
    elif roll < 0.38:
        wrong = wrong.lower()
    return wrong.rstrip(".?") if chance(rng, 0.2) else wrong


def mistaken(rng: Random) -> Pair:
    """One wrong sentence and the right one."""
    roll = rng.random()
    if roll < 0.10:
        wrong, right = pick(rng, pairs("fixes.txt"))
    elif roll < 0.40:
        wrong, right = marked(rng)
    elif roll < 0.56:
        wrong, right = (wrong_article if chance(rng, 0.5) else wrong_plural)(rng)
    else:
        wrong, right = by_clause(rng)
    return mistaken(rng) if wrong == right else (_carelessly(rng, wrong), right)


def is_it_right(rng: Random) -> Turn:
    """ "Is this correct?" asks for a verdict; the right sentence comes with it."""
    wrong, right = mistaken(rng)
    if chance(rng, 0.3):
        return request(rng, "what wrong", wrong), say(rng, "correct this way", {"s": right})
    if chance(rng, 0.35):
        return request(rng, "whether right", right), say(rng, "correct yes")
    return request(rng, "whether right", wrong), say(rng, "correct no", {"s": right})


def correction(rng: Random) -> Turns:
    """A sentence to correct; seldom two, and very seldom one that was right all along."""
    roll = rng.random()
    if roll < 0.14:
        return [is_it_right(rng)]
    wrong, right = mistaken(rng)
    if roll < 0.155:
        return [(request(rng, "correct", right), f"{right} It was correct already.")]
    if roll < 0.21 and wrong[-1] in ".?":
        wrong_too, right_too = mistaken(rng)
        wrong, right = f"{wrong} {wrong_too}", f"{right} {right_too}"
    return [(request(rng, "correct", wrong), right)]
