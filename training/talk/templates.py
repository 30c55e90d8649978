"""Templates with `[one|other]` choices and `{slots}`, and the plain files that hold them.

A slot may ask for a form: `{v:cap}` with a capital, `{v:low}` in small letters, `{v:a}` with its article.
Files are made of blocks divided by blank lines; a block is rows of `KEY: text`, a row `= tag` names it, `#`
begins a comment.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import TypeVar

Turn = tuple[str, str]
Turns = list[Turn]
Sampler = Callable[[Random], Turns]
T = TypeVar("T")

DATA = Path(__file__).parent
CHOICE = re.compile(r"\[([^\[\]]*)\]")
HEADING = re.compile(r"\[([a-z ]+)\]")
SLOT = re.compile(r"\{(\w+)(?::(\w+))?\}")

PULL = "`mistral pull mistralai/Mistral-7B-Instruct-v0.3`"
QUANTIZE = "`mistral quantize mistralai/Mistral-7B-Instruct-v0.3`"
CHAT = "`mistral chat mistral-7b-instruct-v0.3-int4`"
COMMANDS = {
    "pull": PULL,
    "quantize": QUANTIZE,
    "chat": CHAT,
    "steps": f"Three commands do it:\n1. {PULL}\n2. {QUANTIZE}\n3. {CHAT}",
}


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of `options`, all equally likely; several times faster than `rng.choice`."""
    return options[int(rng.random() * len(options))]


def chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def article(phrase: str) -> str:
    """`phrase` with "a" or "an": "an owl", "a unicorn"."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("uni", "use", "uku", "eu", "one"))
    return f"an {phrase}" if vowel or phrase.startswith(("hour", "honest")) else f"a {phrase}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


FORMS: Mapping[str | None, Callable[[str], str]] = {None: str, "cap": capital, "low": str.lower, "a": article}


@cache
def _parts(template: str) -> tuple[tuple[str, ...], ...]:
    pieces = CHOICE.split(template)
    return tuple(tuple(p.split("|")) if index % 2 else (p,) for index, p in enumerate(pieces) if p)


def fill(rng: Random, template: str, slots: Mapping[str, str] = COMMANDS) -> str:
    """`template` with its choices made and its slots filled; an unknown slot is a KeyError."""
    text = "".join([part[0] if len(part) == 1 else pick(rng, part) for part in _parts(template)])
    if "{" in text:
        text = SLOT.sub(lambda match: FORMS[match[2]](slots[match[1]]), text)
    return text


def n_expansions(template: str) -> int:
    """How many texts the choices of `template` allow."""
    total = 1
    for part in _parts(template):
        total *= len(part)
    return total


def say(rng: Random, heading: str, slots: Mapping[str, str] = COMMANDS) -> str:
    """One filled phrasing from the section `heading` of phrases.txt."""
    return fill(rng, pick(rng, sections("phrases.txt")[heading]), slots)


def request(rng: Random, kind: str, sentence: str) -> str:
    """A task for a sentence in words, with `sentence` in it, sometimes in quotation marks."""
    shown = f'"{sentence}"' if chance(rng, 0.15) else sentence
    return say(rng, f"ask {kind}", {"s": shown})


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a file: its tag, its rows by key, and its rows without a key."""

    tag: str
    rows: Mapping[str, tuple[str, ...]]
    items: tuple[str, ...] = field(default=())

    def __getitem__(self, key: str) -> tuple[str, ...]:
        return self.rows.get(key, ())


def _block(lines: Sequence[str]) -> Block:
    tag, rows, items = "", dict[str, list[str]](), list[str]()
    for line in lines:
        key, colon, text = line.partition(": ")
        if line.startswith("= "):
            tag = line[2:]
        elif colon and len(key) == 1 and key.isupper():
            rows.setdefault(key, []).append(text.strip())
        else:
            items.append(line.removeprefix("- "))
    return Block(tag, {key: tuple(texts) for key, texts in rows.items()}, tuple(items))


@cache
def blocks(name: str | Path) -> tuple[Block, ...]:
    """All blocks of `name` (a file of this folder, or any path)."""
    lines = [line.rstrip() for line in (DATA / name).read_text("ascii").splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return tuple(_block(part.splitlines()) for part in re.split(r"\n\n+", text.strip()) if part)


@cache
def sections(name: str) -> dict[str, tuple[str, ...]]:
    """Rows of a file under their `[heading]`."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in (DATA / name).read_text("ascii").splitlines():
        if match := HEADING.fullmatch(line):
            heading = match[1]
        elif line.strip() and not line.startswith("#"):
            found.setdefault(heading, []).append(line.strip())
    return {key: tuple(rows) for key, rows in found.items()}


@cache
def pairs(name: str, heading: str = "") -> tuple[tuple[str, str], ...]:
    """Rows `left => right` of a section."""
    rows = [row.partition(" => ") for row in sections(name)[heading]]
    return tuple((left, right) for left, _, right in rows)
