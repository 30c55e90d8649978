"""Single words: opposites, plurals, past forms, spelling, first letters, a sentence with a word."""

from functools import cache
from random import Random

from training.talk.noise import noisy, terse
from training.talk.templates import Turn, Turns, capital, chance, pick, say, sections


@cache
def _rows(heading: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in sections("words.txt")[heading])


def _quoted(rng: Random, word: str) -> str:
    return f'"{word}"' if chance(rng, 0.25) else word


def _ask(rng: Random, heading: str, word: str) -> str:
    return say(rng, f"words {heading}", {"x": _quoted(rng, word)})


def opposite(rng: Random) -> Turn:
    one, other = pick(rng, _rows("opposites"))
    return _ask(rng, "opposite", one), f"The opposite of {one} is {other}."


def synonym(rng: Random) -> Turn:
    one, other = pick(rng, _rows("synonyms"))
    return _ask(rng, "synonym", one), f"Another word for {one} is {other}."


def plural(rng: Random) -> Turn:
    one, many = pick(rng, _rows("plurals"))
    return _ask(rng, "plural", one), f"The plural of {one} is {many}."


def past(rng: Random) -> Turn:
    base, form = pick(rng, _rows("past"))
    return _ask(rng, "past", base), f"The past tense of {base} is {form}."


def degree(rng: Random) -> Turn:
    base, more, most = pick(rng, _rows("comparatives"))
    if chance(rng, 0.5):
        return f"What comes next: {base}, {more}, ...?", capital(f"{base}, {more}, {most}.")
    ask = pick(rng, ("What is the comparative of {x}?", "What is the superlative of {x}?"))
    kind, form = ("comparative", more) if "comparative" in ask else ("superlative", most)
    return ask.format(x=_quoted(rng, base)), f"The {kind} of {base} is {form}."


@cache
def _short_words() -> tuple[str, ...]:
    """Words that can be spelled: those of the sentence list and of the spelling list."""
    first = [row.split(": ")[0] for row in sections("sentences.txt")[""]]
    second = [row.split()[0] for row in sections("misspelled.txt")[""]]
    return tuple(sorted({*first, *second}))


def spell(rng: Random) -> Turn:
    word = pick(rng, _short_words())
    return _ask(rng, "spell", word), f"{capital(word)} is spelled {'-'.join(word.upper())}."


def is_spelled(rng: Random) -> Turn:
    """ "Is it freind or friend?" """
    words = pick(rng, sections("misspelled.txt")[""]).partition(" | ")[0].split()
    right, wrong = words[0], pick(rng, words[1:])
    if chance(rng, 0.5):
        one, two = rng.sample((right, wrong), 2)
        return f"Is it {one} or {two}?", f"The correct spelling is {right}."
    shown = pick(rng, (right, wrong))
    verdict = "Yes, that is correct" if shown == right else "No, the correct spelling is"
    answer = f"{verdict}." if shown == right else f"{verdict} {right}."
    return f"Is {shown} spelled correctly?", answer


def first_letter(rng: Random) -> Turn:
    word = pick(rng, _short_words())
    return _ask(rng, "first", word), f"{capital(word)} starts with the letter {word[0].upper()}."


def sentence(rng: Random) -> Turn:
    word, _, options = pick(rng, sections("sentences.txt")[""]).partition(": ")
    return _ask(rng, "sentence", word), pick(rng, options.split(" | "))


TASKS = (
    opposite, opposite, opposite, synonym, synonym, plural, plural, past, past, degree, spell, spell,
    is_spelled, first_letter, sentence, sentence,
)  # fmt: skip


def single_words(rng: Random) -> Turns:
    """One question about a word, or two or three of one kind ("And of dry?")."""
    task = pick(rng, TASKS)
    first = task(rng)
    turns = [(noisy(rng, first[0]), first[1])]
    if chance(rng, 0.25):
        second = task(rng)
        if second[1] != first[1]:
            turns.append((terse(rng, second[0]), second[1]))
    return turns
