"""How people type: the same request with or without a greeting, a "please", capitals and a full stop."""

import re
from random import Random

from training.talk.templates import chance, pick

WH = re.compile(r"What (is|are) ((?:an? |the )[a-z]+(?: [a-z]+)?)\?$")
DO = re.compile(r"(Why|How|Where|When|What) do (.+)\?$")
IMPERATIVE = re.compile(
    r"(Tell|Give|Name|List|Write|Explain|Describe|Say|Show|Correct|Make|Shorten|Turn|Put|Change|Rewrite|Count|Spell|Recite)\b"
)
FUNCTION_WORDS = frozenset(
    {
        "a", "an", "the", "is", "are", "do", "does", "did", "what", "which", "can", "you", "me", "tell",
        "please", "of", "to", "i", "it", "in", "be", "so", "there",
    }
)  # fmt: skip
GREETINGS = ("Hi, ", "Hello, ", "Hey, ", "Hi! ", "Hello! ", "Okay, ", "So, ", "Good morning! ", "Now ")
LEADS = (
    "I have a question: ", "Tell me: ", "A question: ", "Quick question: ", "Please tell me: ", "Question: ",
    "My question is: ", "I want to know: ", "Can you answer this? ", "Do you know this? ", "Well, ", "Um, ",
)  # fmt: skip
ASKS = ("Can you ", "Could you ", "Could you please ", "Would you ", "Can you please ", "I want you to ")
INDIRECT = (
    "Can you tell me {}?", "Do you know {}?", "Could you tell me {}?", "I want to know {}.", "Tell me {}.",
    "Please explain {}.", "I wonder {}.", "Explain {}.", "Can you explain {}?", "I would like to know {}.",
)  # fmt: skip
CONTRACTIONS = ("'s", "'s", "'s", "s")
ABOUT = ("Tell me about {}.", "Describe {}.", "What exactly {verb} {}?", "{}?", "Explain {}.")


def lower_first(text: str) -> str:
    """`text` to stand inside a sentence; "I" and names in capitals keep theirs."""
    first = text.split(maxsplit=1)[0].rstrip(",.!?'")
    return text if first in ("I", "I'm") or text[1:2].isupper() else text[:1].lower() + text[1:]


def finished(text: str) -> str:
    """`text` with a full stop when it has no mark at its end."""
    return text if text[-1] in '.!?:`"' else text + "."


def indirect(rng: Random, text: str) -> str:
    """ "What is a comet?" as "Can you tell me what a comet is?", where that is safe; else with a lead."""
    if match := WH.match(text):
        verb, thing = match.groups()
        if chance(rng, 0.4):
            return pick(rng, ABOUT).format(thing, verb=verb)
        return pick(rng, INDIRECT).format(f"what {thing} {verb}")
    if match := DO.match(text):
        question, rest = match[1].lower(), match[2]
        if question == "why" and chance(rng, 0.4):
            return f"How come {rest}?"
        return pick(rng, INDIRECT).format(f"{question} {rest}")
    return pick(rng, LEADS) + lower_first(text)


def keywords(text: str) -> str:
    """`text` as people type into a search box: "why sky blue"."""
    words = text.rstrip(".?! ").split()
    kept = [word for word in words if word.lower() not in FUNCTION_WORDS]
    return " ".join(kept).lower() if len(kept) > 1 else text


def _reframed(rng: Random, text: str) -> str:
    """`text` as a request in other clothes."""
    if IMPERATIVE.match(text):
        if ":" in text or "\n" in text or text.count(".") > 1 or chance(rng, 0.4):
            return "Please " + lower_first(text)
        ask = pick(rng, ASKS)
        return ask + lower_first(text).rstrip(".!") + ("." if ask.startswith("I ") else "?")
    if text.endswith("?"):
        return indirect(rng, text)
    return text


def typo(rng: Random, text: str) -> str:
    """Two letters inside one longer word change places."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha() and word.islower()]
    if not long:
        return text
    at = pick(rng, long)
    word, cut = words[at], rng.randrange(1, len(words[at]) - 2)
    words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def contracted(rng: Random, text: str) -> str:
    """ "What is ..." as "What's ..." or "whats ...", as many write it."""
    words = text.split(" ", 2)
    if len(words) == 3 and words[1] == "is" and words[0] in ("What", "Who", "Where", "How"):
        return f"{words[0]}{pick(rng, CONTRACTIONS)} {words[2]}"
    return text


def terse(rng: Random, text: str) -> str:
    """`text` with fewer marks and capitals, as people type it in the middle of a talk."""
    roll = rng.random()
    if roll < 0.75:
        return text
    if roll < 0.87:
        return text.rstrip(".?! ") or text
    return text.lower().rstrip(".?! ") or text if roll < 0.95 else text[:1].lower() + text[1:]


def noisy(rng: Random, text: str) -> str:
    """`text` as a user may open a talk with it. The words stay, the surface varies."""
    roll = rng.random()
    if roll < 0.08:
        text = _reframed(rng, text)
    elif roll < 0.13:
        text = pick(rng, GREETINGS) + lower_first(text)
    elif roll < 0.15 and text.endswith(".") and IMPERATIVE.match(text):
        text = text[:-1] + ", please."
    return terse(rng, text)


def asked_freely(rng: Random, question: str) -> str:
    """A question as `noisy` has it, or in more other words, as keywords, or with a typo."""
    roll = rng.random()
    if roll < 0.10:
        return terse(rng, _reframed(rng, question))
    if roll < 0.14:
        return keywords(question)
    return typo(rng, question) if roll < 0.16 else noisy(rng, question)
