"""What a tiny model can learn exactly: sums up to twenty, order of numbers, days, months and letters."""

from random import Random

from training.talk.noise import noisy
from training.talk.templates import Turn, Turns, capital, chance, pick, say

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASONS = ("spring", "summer", "autumn", "winter")
CYCLES = ((DAYS, "day"), (DAYS, "day"), (MONTHS, "month"), (MONTHS, "month"), (SEASONS, "season"))
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ITEMS = ("apples", "books", "eggs", "balls", "shells", "pencils", "cups", "stones", "plums", "coins", "keys")
GAINS, LOSSES = ("get", "find", "buy"), ("give away", "lose", "sell")


def upto(rng: Random, top: int) -> int:
    """An integer from 0 to `top`."""
    return int(rng.random() * (top + 1))


def _operands(rng: Random) -> tuple[int, int, bool]:
    """Two numbers, and whether they are added; everything stays within 0 and 20."""
    if chance(rng, 0.55):
        total = upto(rng, 20)
        first = upto(rng, total)
        return first, total - first, True
    first = upto(rng, 20)
    return first, upto(rng, first), False


def addition(rng: Random) -> Turn:
    """ "What is 7 + 5?", "What is 7 plus 5?" or "What is seven plus five?"."""
    first, second, plus = _operands(rng)
    result = first + second if plus else first - second
    roll = rng.random()
    if roll < 0.5:
        sum_ = f"{first} {'+' if plus else '-'} {second}"
        shown = sum_ if chance(rng, 0.65) else sum_.replace(" ", "")
        return say(rng, "numbers solve", {"x": shown}), f"{sum_} = {result}."
    word = "plus" if plus else "minus"
    if roll < 0.75:
        sum_ = f"{WORDS[first]} {word} {WORDS[second]}"
        return capital(say(rng, "numbers solve", {"x": sum_})), f"{capital(sum_)} is {WORDS[result]}."
    sum_ = f"{first} {word} {second}"
    return say(rng, "numbers solve", {"x": sum_}), f"{sum_} is {result}."


def count_phrase(number: int, things: str) -> str:
    return f"{number} {things[:-1] if number == 1 else things}"


def word_problem(rng: Random) -> Turn:
    """Apples that somebody gets or gives away; the answer shows the sum."""
    first, second, plus = _operands(rng)
    while not first or not second:
        first, second, plus = _operands(rng)
    things = pick(rng, ITEMS)
    result = first + second if plus else first - second
    change = f"{pick(rng, GAINS)} {second} more" if plus else f"{pick(rng, LOSSES)} {second}"
    user = f"I have {count_phrase(first, things)} and {change}. " + say(
        rng, "numbers how many", {"things": things}
    )
    have = count_phrase(result, things) if result else f"no {things}"
    return user, f"{first} {'+' if plus else '-'} {second} = {result}, so you have {have}."


def comparison(rng: Random) -> Turn:
    top = 20 if chance(rng, 0.6) else 100
    first, second = upto(rng, top), upto(rng, top)
    if first == second:
        return f"Which is bigger, {first} or {second}?", f"They are equal: both are {first}."
    ask = pick(rng, ("bigger", "smaller", "more", "less"))
    right, other = max(first, second), min(first, second)
    if ask in ("smaller", "less"):
        right, other = other, right
    question = pick(rng, ("Which is", "Which number is", "What is"))
    return f"{question} {ask}, {first} or {second}?", f"{right} is {ask} than {other}."


def is_more(rng: Random) -> Turn:
    first, second = rng.sample(range(21), 2)
    ask = pick(rng, ("bigger", "smaller"))
    true = "bigger" if first > second else "smaller"
    return (
        f"Is {first} {ask} than {second}?",
        f"{'Yes' if ask == true else 'No'}, {first} is {true} than {second}.",
    )


def neighbor_number(rng: Random) -> Turn:
    number = 1 + upto(rng, 19 if chance(rng, 0.6) else 98)
    where, step = pick(rng, (("after", 1), ("before", -1)))
    return say(rng, f"numbers {where}", {"n": str(number)}), f"{number + step} comes {where} {number}."


def counting(rng: Random) -> Turn:
    """Up or down, in digits or in words as the user has it."""
    shown = str if chance(rng, 0.6) else WORDS.__getitem__
    if chance(rng, 0.3):
        top = 3 + upto(rng, 7)
        row, question = range(top, -1, -1), say(rng, "numbers count down", {"n": shown(top)})
    else:
        start = 1 if chance(rng, 0.6) else 1 + upto(rng, 9)
        stop = min(start + 3 + upto(rng, 8), 20)
        heading = "numbers count to" if start == 1 else "numbers count from"
        row, question = range(start, stop + 1), say(rng, heading, {"a": shown(start), "b": shown(stop)})
    return question, capital(", ".join(map(shown, row))) + "."


def even_or_odd(rng: Random) -> Turn:
    number = upto(rng, 20 if chance(rng, 0.6) else 99)
    kind = "odd" if number % 2 else "even"
    if chance(rng, 0.5):
        return f"Is {number} even or odd?", f"{number} is {kind}."
    ask = pick(rng, ("even", "odd"))
    return f"Is {number} an {ask} number?", f"{'Yes' if ask == kind else 'No'}, {number} is {kind}."


def double_or_half(rng: Random) -> Turn:
    number = upto(rng, 10)
    if chance(rng, 0.5):
        return f"What is {pick(rng, ('double', 'twice'))} {number}?", f"Twice {number} is {2 * number}."
    return f"What is half of {2 * number}?", f"Half of {2 * number} is {number}."


def in_order(rng: Random) -> Turn:
    """The day, month or season after or before another."""
    cycle, word = pick(rng, CYCLES)
    at = upto(rng, len(cycle) - 1)
    where, step = pick(rng, (("after", 1), ("before", -1)))
    other = cycle[(at + step) % len(cycle)]
    question = say(rng, "numbers order", {"w": word, "p": where, "x": cycle[at]})
    return question, f"{capital(other)} comes {where} {cycle[at]}."


def whole_cycle(rng: Random) -> Turn:
    heading, names = pick(rng, (("numbers days", DAYS), ("numbers months", MONTHS)))
    return say(rng, heading), ", ".join(names[:-1]) + f" and {names[-1]}."


def month_fact(rng: Random) -> Turn:
    at = upto(rng, 11)
    month, roll = MONTHS[at], rng.random()
    if roll < 0.5:
        leap = ", and 29 in a leap year" if month == "February" else ""
        return say(rng, "numbers month length", {"m": month}), f"{month} has {LENGTHS[at]} days{leap}."
    if roll < 0.75:
        return f"What is the {ORDINALS[at]} month of the year?", f"The {ORDINALS[at]} month is {month}."
    return f"Which month of the year is {month}?", f"{month} is the {ORDINALS[at]} month."


def if_today(rng: Random) -> Turn:
    at = upto(rng, 6)
    if chance(rng, 0.6):
        return f"If today is {DAYS[at]}, what day is tomorrow?", f"Then tomorrow is {DAYS[(at + 1) % 7]}."
    return f"If today is {DAYS[at]}, what day was yesterday?", f"Then yesterday was {DAYS[at - 1]}."


def neighbor_letter(rng: Random) -> Turn:
    at = upto(rng, 25)
    where, step = pick(rng, (("after", 1), ("before", -1)))
    if not 0 <= at + step < 26:
        where, step = ("before", -1) if at else ("after", 1)
    letter = ALPHABET[at] if chance(rng, 0.8) else ALPHABET[at].lower()
    question = say(rng, "numbers letter", {"p": where, "x": letter})
    return question, f"{ALPHABET[at + step]} comes {where} {ALPHABET[at]}."


def whole_alphabet(rng: Random) -> Turn:
    which, letter = pick(rng, (("first", "A"), ("last", "Z")))
    if chance(rng, 0.5):
        return say(rng, "numbers alphabet"), " ".join(ALPHABET) + "."
    return f"What is the {which} letter of the alphabet?", f"{letter} is the {which} letter of the alphabet."


TASKS = (
    *((addition,) * 9), word_problem, word_problem, comparison, comparison, is_more, neighbor_number,
    counting, even_or_odd, double_or_half, in_order, in_order, whole_cycle, month_fact, if_today,
    neighbor_letter, neighbor_letter, whole_alphabet,
)  # fmt: skip


def small_numbers(rng: Random) -> Turns:
    """One small task; sometimes a second of the same kind."""
    task = pick(rng, TASKS)
    turns: Turns = []
    for _ in range(1 if chance(rng, 0.75) else 2):
        user, answer = task(rng)
        if all(answer != earlier for _, earlier in turns):
            turns.append((noisy(rng, user) if chance(rng, 0.7) else user, answer))
    return turns
