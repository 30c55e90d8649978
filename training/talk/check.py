"""Checks the authored data and the samplers: `python -m training.talk.check` prints counts and what is wrong.

Looks for letters outside ASCII, unfilled slots, blocks that are too thin, doubled questions and items,
grammar that shows (two spaces, "a owl"), answers that miss their key facts, and held-out phrasings that a
template can produce.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from random import Random

from training.talk import answers, chats, lists, memory, numbers, refusals, rewrite, smalltalk, words
from training.talk.answers import plain
from training.talk.templates import CHOICE, DATA, Sampler, blocks, n_expansions, sections

TALK = ("smalltalk.txt", "about.txt", "refusals.txt", "odd.txt", "memory.txt")
SAMPLERS: dict[str, Sampler] = {
    "small talk": smalltalk.small_talk, "about": smalltalk.about, "feelings": smalltalk.feelings,
    "favorites": smalltalk.favorites, "jokes": smalltalk.jokes, "verses": smalltalk.verses,
    "curious": smalltalk.curious,
    "lists": lists.list_once, "list chats": lists.list_chat, "rewriting": rewrite.rewriting,
    "words": words.single_words, "numbers": numbers.small_numbers, "not told": memory.unknown,
    "remembered": chats.remembered, "refusals": refusals.refusal, "odd": refusals.odd,
    "questions": answers.question_chat,
}  # fmt: skip
N_SAMPLES = 3000
WRONG = re.compile(
    r"[{}\[\]|]| {2}|[,;:]\.| [.,?!;](?!\.)|\b(?!la\b)(\w\w+) \1\b|^\s|\s$|(?<!\.)\.\.(?!\.)|[?!]\."
)
CODE = re.compile(r"`[^`]*`")
WRONG_ARTICLE = re.compile(r"\b(an [bcdfgjklmnpqrstvwxyz]\w+|a [aeio]\w+)")
ARTICLE_IS_FINE = re.compile(r"an? (one|ewe|eu\w*|an|and|is|before)\b")


def expansions(template: str) -> Iterator[str]:
    """Every text that the choices of `template` allow."""
    parts = CHOICE.split(template)
    options = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return ("".join(choice) for choice in itertools.product(*options))


def not_ascii() -> Iterator[str]:
    for path in sorted((*DATA.glob("*.txt"), *answers.FOLDER.glob("*.txt"))):
        if not path.read_bytes().isascii():
            yield f"{path.name}: not ASCII"


def thin_blocks() -> Iterator[str]:
    """Blocks with fewer than 5 (small talk: 6) answers, or topics with fewer than 5 items."""
    for name, least in (("smalltalk.txt", 6), ("about.txt", 6), ("refusals.txt", 5), ("odd.txt", 6)):
        for block in blocks(name):
            if len(block["A"]) < least:
                yield f"{name} {block.tag}: {len(block['A'])} answers"
    for topic in lists.topics():
        if len(topic.items) < 5 or len(set(topic.items)) < len(topic.items):
            yield f"list {topic.things!r}: items few or doubled"


def doubled_questions() -> Iterator[str]:
    """One question in two blocks, which would make two answers right."""
    owner: dict[str, str] = {}
    for name in ("smalltalk.txt", "about.txt", "odd.txt"):
        for block in blocks(name):
            for text in {plain(text) for question in block["Q"] for text in expansions(question)}:
                if owner.setdefault(text, block.tag) != block.tag:
                    yield f"{name}: {text!r} in {block.tag} and {owner[text]}"


def doubled_rows() -> Iterator[str]:
    for path in sorted(DATA.glob("*.txt")):
        rows = Counter(row for row in path.read_text("ascii").splitlines() if len(row) > 40)
        yield from (f"{path.name}: {n} times {row!r}" for row, n in rows.items() if n > 1)


def missed_keys() -> Iterator[str]:
    for question in answers.questions():
        for answer in question.answers:
            if question.keys and not answers.says(answer, question.keys):
                yield f"qa {question.topic}: {answer!r} misses {question.keys!r}"


def looks_wrong(text: str, is_answer: bool) -> bool:
    text = CODE.sub("code", text)
    article = WRONG_ARTICLE.search(text) if is_answer else None
    return bool(WRONG.search(text) or (article and not ARTICLE_IS_FINE.match(article[0])))


def bad_samples() -> Iterator[str]:
    """Samples of every kind whose text shows a slip of a template."""
    for name, sampler in SAMPLERS.items():
        rng = Random(f"check {name}")
        for _ in range(N_SAMPLES):
            for user, answer in sampler(rng):
                if looks_wrong(answer, True):
                    yield f"{name}: {answer!r}"
                if not user.strip() or not answer.strip():
                    yield f"{name}: empty turn"


def counts() -> dict[str, int]:
    found = {
        f"{name} blocks": len(blocks(name)) for name in (*TALK, "feelings.txt", "favorites.txt", "verses.txt")
    }
    talk = [block for name in TALK for block in blocks(name)]
    topics = lists.topics()
    return found | {
        "phrasings of talk": sum(n_expansions(text) for block in talk for text in (*block["Q"], *block["S"])),
        "answers of talk": sum(len(block[key]) for block in talk for key in ("A", "R", "U")),
        "jokes": sum(row.startswith("J: ") for row in sections("jokes.txt")[""]),
        "riddles": sum(row.startswith("R: ") for row in sections("jokes.txt")[""]),
        "list topics": len(topics),
        "list items": sum(len(topic.items) for topic in topics),
        "wordings of tasks": sum(map(len, sections("phrases.txt").values())),
        "fixes": len(sections("fixes.txt")[""]),
        "polite pairs": len(sections("polite.txt")[""]),
        "sentences to shorten": len(sections("shorten.txt")[""]),
        "misspelled words": len(sections("misspelled.txt")[""]),
        "word rows": sum(map(len, sections("words.txt").values())),
        "questions": len(answers.questions()),
    }


CHECKS = (not_ascii, thin_blocks, doubled_questions, doubled_rows, missed_keys, bad_samples)


def main() -> int:
    for name, count in counts().items():
        print(f"{count:6} {name}")
    problems = sorted({problem for check in CHECKS for problem in check()})
    print("\n".join(problems[:200]))
    print(f"{len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
