"""A question in other words: another frame ("Why do cats purr?", "How come cats purr?"), other words, fewer words.

A small model takes a question for what it is only when it has met it in many clothes. What comes out is what a
user types, so it need not be perfect English.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from training.talk.clauses import third_person
from training.talk.noise import FUNCTION_WORDS, lower_first
from training.talk.templates import capital, chance, fill, pick, sections

SUBJECT = r"((?:an? |the |my |our |some )?[\w-]+)"
NOT_A_NOUN = frozenset(
    {
        "for",
        "like",
        "called",
        "of",
        "in",
        "from",
        "used",
        "good",
        "mean",
        "do",
        "about",
        "with",
        "to",
        "on",
        "at",
    }
)
ASKING = frozenset({"what", "which", "who", "whose", "why", "how", "where", "when", "many", "much"})
WORD = re.compile(r"[a-z]+")
CONTENT = re.compile(r"[A-Za-z0-9'-]{3,}")


def _noun(match: re.Match[str]) -> dict[str, str] | None:
    """What is asked for, where it is a thing: "a comet", "the capital of France"."""
    thing = match["x"]
    few = len(thing.split()) <= (6 if " of " in thing else 3)
    return {"x": thing, "be": match["be"]} if few and thing.split()[-1] not in NOT_A_NOUN else None


def _does(match: re.Match[str]) -> dict[str, str]:
    clause = f"{match['s']} {third_person(match['v'])}{match['rest']}"
    return {"c": clause, "w": match["w"].lower()} if "w" in match.groupdict() else {"c": clause}


def _is(match: re.Match[str]) -> dict[str, str]:
    return {"c": f"{match['s']} {match['be']} {match['rest']}"}


def _plain(match: re.Match[str]) -> dict[str, str]:
    return {key: lower_first(text) for key, text in match.groupdict().items()}


Slots = Callable[[re.Match[str]], dict[str, str] | None]
# A pattern of questions, its slots, and the section of rephrase.txt that says it in other words; the first wins.
FRAMES: tuple[tuple[re.Pattern[str], Slots, str], ...] = tuple(
    (re.compile(pattern), slots, section)
    for pattern, slots, section in (
        (r"What (?P<be>is|are) (?P<x>.+) (?:used for|for|good for)\?", _plain, "use"),
        (r"What do (?:people|you|we) use (?P<x>.+) for\?", _plain, "use"),
        (r"What (?:does|is meant by) (?:the word )?(?P<x>\w+)(?: mean)?\?", _plain, "meaning"),
        (r"What is the (?:job|work) of (?P<x>.+)\?", _plain, "work"),
        (r"What does (?P<x>an? .+) do\?", _plain, "work or action"),
        (r"What does (?P<x>.+) do\?", _plain, "action"),
        (r"What (?P<be>is|are) (?P<x>(?:the|my|your) .+)\?", _noun, "the thing"),
        (r"What (?P<be>is|are) (?P<x>.+)\?", _noun, "a thing"),
        (r"Why do (?P<c>.+)\?", _plain, "why"),
        (rf"Why does (?P<s>{SUBJECT}) (?P<v>[a-z]+)(?P<rest>.*)\?", _does, "why"),
        (rf"Why (?P<be>is|are|was|were) (?P<s>{SUBJECT}) (?P<rest>.+)\?", _is, "why"),
        (r"How (?:do|can|should|would) (?:I|you|we|people) (?P<x>.+)\?", _plain, "how to"),
        (r"How does (?P<x>.+) work\?", _plain, "how it works"),
        (rf"(?P<w>How|Where|When|What) does (?P<s>{SUBJECT}) (?P<v>[a-z]+)(?P<rest>.*)\?", _does, "clause"),
        (r"(?P<w>How|Where|When|What|Which \w+) do (?P<c>.+)\?", _plain, "clause"),
        (r"(?P<w>Which|Who|What) (?P<c>(?!.*\b(?:do|does|did|is|are|can|should)\b).+)\?", _plain, "clause"),
        (r"(?P<w>Which|Who) (?P<c>\w+ (?:is|are) .+)\?", _plain, "clause"),
        (r"(?:Tell me about|Explain|Describe) (?P<x>.+)\.", _plain, "topic"),
    )
)


def reframed(rng: Random, question: str) -> str | None:
    """`question` in another frame; None where no frame is known for it."""
    for pattern, slots_of, section in FRAMES:
        match = pattern.fullmatch(question)
        slots = slots_of(match) if match else None
        if slots is not None:
            return capital(fill(rng, pick(rng, sections("rephrase.txt")[section]), slots))
    return None


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
    if roll < 0.10:
        return clue(rng, shuffled[0], answer)
    if roll < 0.17:
        return about_fact(rng, answer)
    others = (reframed(rng, question) for question in shuffled) if roll < 0.8 else iter(())
    text = next((other for other in others if other), shuffled[0])
    text = with_synonyms(rng, text) if chance(rng, 0.4) else text
    return fewer_words(rng, text) if chance(rng, 0.12) else text
