"""Messages of several lines: pasted texts that the model cannot work on, system prompts, a greeting on its own line."""

from collections.abc import Callable
from functools import cache
from random import Random

from training.talk.answers import questions
from training.talk.memory import made_up_word
from training.talk.templates import DATA, Block, Turns, blocks, chance, fill, pick

SYSTEM_SHARE, LINES_SHARE = 0.03, 0.02
"""How many conversations have a system prompt, and how many a first message of several lines."""

VERBS = ("load", "read", "open", "find", "make", "send", "check", "count", "parse", "close", "update", "sort")
LEVELS = ("INFO", "ERROR", "WARNING", "DEBUG", "Error", "Exception", "fatal", "warning")
CODE: tuple[str, ...] = (
    "return {a}",
    "{a} = {b}.{v}()",
    "if {a}:",
    "for {a} in {b}:",
    "{v}_{a}({b})",
    "print({a})",
    "import {b}",
)
CODE += (
    "def {v}_{a}({b}):",
    "{a} += 1",
    "const {a} = {b};",
    "raise ValueError({a})",
    "{a}.{v}({b}, {n})",
    "}}",
)
BEFORE = ("Hi!", "Hello!", "Hello,", "Hi there,", "Hey", "Good morning!", "A question:", "Please help me.")
AFTER = ("Thanks!", "Thank you!", "Thanks in advance.", "Please be brief.", "Thank you very much.", "Cheers")


def _word(rng: Random) -> str:
    return made_up_word(rng) if chance(rng, 0.5) else pick(rng, VERBS)


def _code_line(rng: Random) -> str:
    slots = {"a": _word(rng), "b": _word(rng), "v": pick(rng, VERBS), "n": str(int(rng.random() * 100))}
    return "    " * int(rng.random() * 3) + pick(rng, CODE).format(**slots)


def _diff(rng: Random) -> str:
    name, line = f"{_word(rng)}.py", int(rng.random() * 200) + 1
    head = f"diff --git a/{name} b/{name}\n@@ -{line},{line % 7 + 3} +{line},{line % 5 + 3} @@"
    return "\n".join([head, *(pick(rng, "+- ") + _code_line(rng) for _ in range(_count(rng)))])


def _code(rng: Random) -> str:
    return "\n".join(_code_line(rng) for _ in range(_count(rng)))


def _log(rng: Random) -> str:
    def line() -> str:
        place = f"{_word(rng)}.py:{int(rng.random() * 400)}"
        return f"{pick(rng, LEVELS)}: {place}: cannot {pick(rng, VERBS)} {_word(rng)}"

    return "\n".join(line() for _ in range(max(1, _count(rng) // 2)))


def _table(rng: Random) -> str:
    mark, width = pick(rng, (",", ";", " | ", "\t")), 2 + int(rng.random() * 3)

    def cell() -> str:
        return _word(rng) if chance(rng, 0.4) else str(int(rng.random() * 1000))

    return "\n".join(mark.join(cell() for _ in range(width)) for _ in range(_count(rng)))


def _prose(rng: Random) -> str:
    texts = [pick(rng, pick(rng, questions()).answers) for _ in range(2 + int(rng.random() * 5))]
    return pick(rng, (" ", "\n", "\n\n")).join(texts)


def _count(rng: Random) -> int:
    return 2 + int(rng.random() * 8)


PASTED: dict[str, Callable[[Random], str]] = {
    "diff": _diff,
    "code": _code,
    "log": _log,
    "table": _table,
    "prose": _prose,
}


def _of_kind(rng: Random, block: Block) -> Turns:
    asked, pasted = fill(rng, pick(rng, block["Q"])), PASTED[block.tag](rng)
    parts = (asked, pasted) if chance(rng, 0.8) else (pasted, asked)
    return [(pick(rng, ("\n", "\n\n")).join(parts), fill(rng, pick(rng, block["A"])))]


def pasted(rng: Random) -> Turns:
    """A task for a pasted text, and why the model cannot do it."""
    return _of_kind(rng, pick(rng, blocks("pasted.txt")))


@cache
def _system_prompts() -> tuple[str, ...]:
    lines = (DATA / "system.txt").read_text("ascii").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def framed(rng: Random, turns: Turns) -> Turns:
    """The conversation, now and then with a system prompt or with a first message of several lines."""
    if chance(rng, SYSTEM_SHARE):
        (user, answer), before = turns[-1], turns[:-1]
        return [*before, (f"{pick(rng, _system_prompts())}\n\n{user}", answer)]
    if chance(rng, LINES_SHARE):
        (user, answer), after = turns[0], turns[1:]
        gap = pick(rng, ("\n", "\n\n"))
        lines = pick(rng, ((pick(rng, BEFORE), user), (user, pick(rng, AFTER))))
        return [(gap.join(lines), answer), *after]
    return turns
