"""Sentence templates: a line of text with `{slots}` and `[one|another]` choices, compiled once.

`compile_line` expands every choice, writes the slots that begin a sentence as `{^slot}` (the capital
form), and notes for each sentence who and what it names, so that the teller can choose between a name
and a pronoun and can promise that the hero is never lost from sight.
"""

import itertools
import re
from dataclasses import dataclass

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\^?\w+)\}")
SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z{])')
AFTER_SPEECH = re.compile(r'[!?]" $')  # `"Stop!" she said`
SPEAKS = re.compile(r" (?:said|asked|called|cried|shouted|thought|whispered|wondered|told|repeated)\b")
BEGINS_SENTENCE = re.compile(r'(?:^|[.!?]"?\s+|\s)"$|(?:^|[.!?]"?\s+)$')

SMART_SLOTS = frozenset({"h", "hs"})  # a name, "the fox" or a pronoun, as fits
NAMED_SLOTS = frozenset({"n", "k", "t", "ns", "v", "problem"})  # always a name or "the fox"
ADDRESSED = re.compile(r'(?:(?<=, )|(?<=")|(?<=Dear ))\{n\}(?=[.,!?])')
FRIEND = re.compile(r"\{\^?fs?\}")
FRIEND_SLOTS = frozenset({"f", "fs"})  # an introduction the first time, a name or "the owl" later


@dataclass(frozen=True, slots=True)
class Mark:
    """What one sentence of a line names."""

    named: bool
    smart: bool


@dataclass(frozen=True, slots=True)
class Line:
    """One compiled template: `text` for `str.format_map`, and what must be known before rendering it."""

    text: str
    marks: tuple[Mark, ...]
    smart: bool
    friend: bool
    spoken: bool  # the friend is named in direct speech
    introduces: bool


Lines = tuple[Line, ...]


def expand(template: str) -> list[str]:
    """All texts that the `[a|b]` choices of a template allow (choices do not nest)."""
    parts = CHOICE.split(template)
    options = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return [re.sub(r"\s+", " ", "".join(choice)).strip() for choice in itertools.product(*options)]


def sentences(text: str) -> list[str]:
    """The sentences of a text; a quotation that goes on in lower case belongs to its sentence."""
    return SENTENCE_END.split(text)


def _capital_slots(text: str) -> str:
    def mark(match: re.Match[str]) -> str:
        before = text[: match.start()]
        speaks = match[1] in ("he", "fhe") and AFTER_SPEECH.search(before) and SPEAKS.match(text, match.end())
        begins = not speaks and BEGINS_SENTENCE.search(before)
        return f"{{^{match[1]}}}" if begins and not match[1].startswith("^") else match[0]

    text = SLOT.sub(mark, text)
    start = 1 if text.startswith('"') else 0
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]


def _vocatives(text: str) -> str:
    """The slot `{v}` for a hero who is spoken to: "Come in, Ruby", "Come in, my friends"."""

    def address(match: re.Match[str]) -> str:
        return "{v}" if text[: match.start()].count('"') % 2 else match[0]

    return ADDRESSED.sub(address, text)


def slots_of(text: str) -> set[str]:
    return {slot.lstrip("^") for slot in SLOT.findall(text)}


def _mark(sentence: str) -> Mark:
    slots = slots_of(sentence)
    return Mark(bool(slots & NAMED_SLOTS), bool(slots & SMART_SLOTS))


def compile_line(template: str) -> Lines:
    """Every expansion of one template, ready to be rendered."""
    lines = []
    for text in map(_capital_slots, map(_vocatives, expand(template))):
        slots = slots_of(text)
        lines.append(
            Line(
                text=text,
                marks=tuple(map(_mark, sentences(text))),
                smart=bool(slots & SMART_SLOTS),
                friend=bool(slots & FRIEND_SLOTS),
                spoken=any(text[: m.start()].count('"') % 2 for m in FRIEND.finditer(text)),
                introduces="af" in slots,
            )
        )
    return tuple(lines)


def an(phrase: str) -> str:
    """`phrase` with its indefinite article: "an owl", "a unicorn"."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("uni", "use", "uku", "eu", "one"))
    return f"{'an' if vowel or phrase.startswith(('hour', 'honest')) else 'a'} {phrase}"


def capital(phrase: str) -> str:
    return phrase[:1].upper() + phrase[1:]


def joined(names: tuple[str, ...]) -> str:
    """ "Pip", "Pip and Dot", "Pip, Dot and Max"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
