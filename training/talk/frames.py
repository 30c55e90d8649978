"""Frames of questions: "Why do cats purr?" becomes "How come cats purr?", "My son asks why cats purr.", and so on.

A frame is a pattern of questions with the section of rephrase.txt that says it in other words. What no pattern
knows is asked with a lead ("I would like to know: ..."), and an order ("Name the oceans.") politely.
"""

import re
from collections.abc import Callable
from functools import cache
from random import Random

from training.talk.clauses import third_person
from training.talk.noise import lower_first
from training.talk.templates import capital, chance, fill, pick, sections

SUBJECT = r"((?:an? |the |my |our |some )?[\w-]+)"
SHORT = r"(?P<s>I|you|we|people|it|(?:an?|the) [\w-]+|[\w-]+s)"
NAMED = r"(?P<s>(?!in |on |at |first on |.*\b(?:when|if|that|who|named)\b).+)"
PRONOUN = r"(?P<s>it|there|I|we|you|they|this|that)"
# A subject of one to six words, not only a part of "tea and coffee".
WHO = (
    r"(?P<s>(?!(?:it|there|I|we|you|they|this|that)\b)"
    r"(?:(?:an?|the|my|our|your|all|every|some|other) )?\S+(?: (?!when\b|if\b|that\b)\S+){0,4}?)"
    r"(?<! and)(?<! or)(?<! of)"
)
BE = r"(?P<be>is|are|was|were)"
MODAL = r"(?P<be>can|should|must|may|might|will|would|could)"
ASKED = (
    r"(?P<w>(?:(?:On|In|At|From|With) )?(?:What|Which)(?: [a-z]+)?|Where|When|Who|Why|How(?: [a-z]+){0,2}?)"
)
NOT_A_NOUN = frozenset(
    (
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
        "made",
        "worth",
        "different",
    )
)
ORDER = re.compile(
    r"(?:Name|List|Tell|Give|Say|Show|Spell|Count|Explain|Describe|Recite|Roll|Flip|Teach) [^.:]+\."
)
SWAPPED = re.compile(
    r"(?P<w>What|Which) (?P<noun>(?!is|are|was|were|do|did|of|if|one|can|has|have|should|must|may|would|will"
    r"|happens|exactly|else)[a-z]+)\b(?P<rest>.*)"
)
ACTING = frozenset(
    (
        "helps",
        "makes",
        "causes",
        "keeps",
        "goes",
        "comes",
        "gives",
        "holds",
        "lives",
        "eats",
        "carries",
        "protects",
        "stops",
    )
)
THINGS = re.compile(
    r"What (?P<rest>(?:do|does) .+ (?:need|eat|use|make|have|like|see|give|carry|drink|contain|produce)\b.*\?"
    r"|(?:can|should|must|may) (?!I do|you do|one do).+)"
)
NO_TOPIC = frozenset(
    ("it", "i", "you", "we", "they", "people", "one", "there", "the", "a", "an", "this", "that", "my", "your")
)


@cache
def words_of(section: str) -> str:
    """The words of a section of rephrase.txt as alternatives of a pattern."""
    return "|".join(word for row in sections("rephrase.txt")[section] for word in row.split())


TOPIC = re.compile(
    rf"What (?:is|are) (?P<thing>(?:an? )?[\w-]+)\?|(?:Why|How|Where|When|What) (?:do|does|can) "
    rf"(?P<doer>(?:an? |the )?[\w-]+) (?:{words_of('verbs')})\b.*\?"
)
SAID_OF = rf"(?:{words_of('predicates')}|\w+ed)\b.*"
DOES = rf"(?P<v>{words_of('verbs')})\b(?P<rest>.*)"


def _noun(match: re.Match[str]) -> dict[str, str] | None:
    """What is asked for, where it is a thing: "a comet", "the capital of France"."""
    thing = match["x"]
    few = len(thing.split()) <= (6 if " of " in thing else 3)
    noun = thing.split()[0] not in NOT_A_NOUN and thing.split()[-1] not in NOT_A_NOUN
    return {"x": thing, "be": match["be"]} if few and noun else None


def _plain(match: re.Match[str]) -> dict[str, str]:
    """The groups as they are; the word that asks is small."""
    return {key: lower_first(text) if key == "w" else text for key, text in match.groupdict().items()}


def _use(match: re.Match[str]) -> dict[str, str]:
    """A thing with its "is" or "are": "hammers", "are"."""
    thing = match["x"]
    many = thing.endswith("s") and not thing.endswith("ss") and not thing.startswith(("a ", "an "))
    return {"x": thing, "be": match.groupdict().get("be") or ("are" if many else "is")}


def _does(match: re.Match[str]) -> dict[str, str]:
    """A clause of what is asked with "does": "the sun shines"; `m` has the verb as it is."""
    subject, verb, rest = match["s"], match["v"], match["rest"]
    asked = match.groupdict().get("w", "").lower()
    if subject.endswith(" not"):
        return {"w": asked, "c": f"{subject[:-4]} does not {verb}{rest}"}
    return {"w": asked, "c": f"{subject} {third_person(verb)}{rest}", "m": f"{subject} {verb}{rest}"}


def _do(match: re.Match[str]) -> dict[str, str]:
    clause = match["c"]
    if " not " in clause:
        return {"c": clause.replace(" not ", " do not ", 1)}
    return {"c": clause} if clause.split()[0] in ("I", "we", "they") else {"c": clause, "m": clause}


def _ordered(match: re.Match[str]) -> dict[str, str]:
    """A clause in the order of a statement: "the sky is blue", "where Egypt is"."""
    found = match.groupdict()
    subject, rest = found["s"], found.get("rest") or ""
    slots = {"c": f"{subject} {found['be'].lower()} {rest}".strip(), "w": (found.get("w") or "").lower()}
    plain = bool(rest) and " " not in rest and subject not in ("it", "there", "I", "we", "they")
    return slots if not plain or found["be"] not in ("is", "are") else slots | {"m": f"{subject} {rest}"}


def _property(match: re.Match[str]) -> dict[str, str]:
    return match.groupdict() | {"do": "does" if match["be"] == "is" else "do"}


Slots = Callable[[re.Match[str]], dict[str, str] | None]
# A pattern of questions, its slots, and the section of rephrase.txt that says it in other words; the first wins.
FRAMES: tuple[tuple[re.Pattern[str], Slots, str], ...] = tuple(
    (re.compile(pattern), slots, section)
    for pattern, slots, section in (
        (r"(?:What is|Explain) the difference between (?P<x>.+) and (?P<y>.+)[?.]", _plain, "difference"),
        (r"What (?:is|are) (?P<x>.+) called\?", _plain, "called"),
        (r"What do (?:people|you|we) call (?P<x>.+)\?", _plain, "called"),
        (r"What (?P<be>is|are) (?P<x>.+?) (?:used for|for|good for)\?", _use, "use"),
        (r"What do (?:people|you|we) use (?P<x>.+) for\?", _use, "use"),
        (r"What do you do with (?P<x>.+)\?", _use, "use"),
        (r"What (?:does|is meant by) (?:the word )?(?P<x>\w+)(?: mean)?\?", _plain, "meaning"),
        (r"What does (?P<x>(?!it\b).+) mean\?", _plain, "phrase"),
        (r"What is the (?:job|work) of (?P<x>.+)\?", _plain, "work"),
        (r"What does (?P<x>an? .+) do\?", _plain, "work or action"),
        (r"What does (?P<x>.+) do\?", _plain, "action"),
        (rf"What {BE} (?P<x>(?:the|my|your) .+)\?", _noun, "the thing"),
        (rf"What {BE} (?P<x>.+)\?", _noun, "a thing"),
        (
            r"(?:What|Which) (?P<w>shape|color) (?P<be>is|are) (?P<x>(?!.*\bfor\b).+)\?",
            _property,
            "property",
        ),
        (r"Why do (?P<c>.+)\?", _do, "why"),
        (rf"Why does {WHO} {DOES}\?", _does, "why"),
        (rf"Why does (?P<s>{SUBJECT}) (?P<v>[a-z]+)(?P<rest>.*)\?", _does, "why"),
        (rf"Why {BE} {PRONOUN} (?P<rest>.+)\?", _ordered, "why"),
        (rf"Why {BE} {WHO} (?P<rest>{SAID_OF})\?", _ordered, "why"),
        (rf"Why {BE} (?P<s>{SUBJECT}) (?P<rest>\w+)\?", _ordered, "why"),
        (rf"Why {MODAL} (?P<s>{SUBJECT}) (?P<rest>.+)\?", _ordered, "why"),
        (r"How (?:do|can|should|would) (?:I|you|we|people) (?P<x>(?!in ).+)\?", _plain, "how to"),
        (r"Tell me how to (?P<x>.+)\.", _plain, "how to"),
        (r"How does (?P<x>.+) work\?", _plain, "how it works"),
        (rf"{ASKED} does {WHO} {DOES}\?", _does, "clause"),
        (rf"(?P<w>How|Where|When|What) does (?P<s>{SUBJECT}) (?P<v>[a-z]+)(?P<rest>.*)\?", _does, "clause"),
        (rf"{ASKED} do (?P<c>.+)\?", _plain, "clause"),
        (rf"{ASKED} {BE} {PRONOUN}(?: (?P<rest>.+))?\?", _ordered, "clause"),
        (
            rf"(?P<w>What) {BE} {WHO} (?P<rest>(?:made|like|used|grown|filled|covered)\b.*)\?",
            _ordered,
            "clause",
        ),
        (
            rf"(?!What|Which|Who){ASKED} {BE} (?!in |on |at ){WHO} (?P<rest>{SAID_OF})\?",
            _ordered,
            "clause",
        ),
        (
            rf"(?P<w>Where|When|Who|How [a-z]+) {BE} {NAMED}\?",
            _ordered,
            "clause",
        ),
        (
            rf"(?P<w>What|Where|When|How) {MODAL} {SHORT} (?P<rest>.+)\?",
            _ordered,
            "clause",
        ),
        (r"(?P<w>How many [a-z]+) (?P<c>(?:are|is|have|has|can|make) .+)\?", _plain, "clause"),
        (
            r"(?P<w>Which|Who|What) (?P<c>(?!.*\b(?:do|does|did|is|are|was|were|can|should)\b).+)\?",
            _plain,
            "clause",
        ),
        (r"(?P<w>Which|Who) (?P<c>\w+ (?:is|are|can|has|have) .+)\?", _plain, "clause"),
        (rf"(?P<be>Is|Are|Was|Were) {PRONOUN} (?P<rest>.+)\?", _ordered, "whether"),
        (
            rf"(?P<be>Is|Are|Was|Were) {WHO} (?P<rest>{SAID_OF})\?",
            _ordered,
            "whether",
        ),
        (r"Do (?P<c>.+)\?", _do, "whether"),
        (rf"Does {WHO} {DOES}\?", _does, "whether"),
        (rf"(?P<be>Can|Should|May|Must|Will) (?P<s>{SUBJECT}) (?P<rest>.+)\?", _ordered, "whether"),
        (
            r"(?:Tell me about|Explain|Describe) (?P<x>(?!what |how |why |when |where |the word ).+)\.",
            _use,
            "topic",
        ),
    )
)
DEFINITION = re.compile(
    r"(?:An?|The) (?P<x>[a-z]+(?: [a-z]+)?) is (?P<d>an? [^.;:]+?)(?:\.(?!\d)|;|:|, (?:and|but|so) )"
)
WHAT_IS = re.compile(r"What is an? (?P<x>[a-z ]+)\?")


def turned_around(rng: Random, question: str, answer: str) -> str | None:
    """ "What do we call a young cat?" for "What is a kitten?" with an answer that defines it; else None."""
    asked, defined = WHAT_IS.fullmatch(question), DEFINITION.match(answer)
    if not asked or not defined or asked["x"] != defined["x"] or asked["x"] in defined["d"]:
        return None
    return capital(fill(rng, pick(rng, sections("rephrase.txt")["definition"]), {"x": defined["d"]}))


def swapped(rng: Random, question: str) -> str:
    """`question` with "which" for "what" or the other way round, where both may stand."""
    if match := THINGS.fullmatch(question):
        return f"Which things {match['rest']}"
    match = SWAPPED.fullmatch(question)
    if not match:
        return question
    noun = match["noun"]
    if match["w"] == "Which":
        kinds = ("What", "What sort of", "What kind of") if noun.endswith("s") else ("What",)
        return f"{pick(rng, kinds)} {noun}{match['rest']}"
    return f"Which {'thing ' if noun in ACTING else ''}{noun}{match['rest']}"


@cache
def known(question: str) -> tuple[str, dict[str, str]] | None:
    """The section that says `question` in other words, with the slots; None where no pattern knows it."""
    for pattern, slots_of, section in FRAMES:
        match = pattern.fullmatch(question)
        slots = slots_of(match) if match else None
        if slots is not None:
            return section, slots
    return None


def in_frame(rng: Random, question: str) -> str | None:
    """`question` in a frame made for its kind; None where there is none."""
    found = known(question)
    if not found:
        return None
    section, slots = found
    heading = "makes" if section == "why" and "m" in slots and chance(rng, 0.15) else section
    return capital(fill(rng, pick(rng, sections("rephrase.txt")[heading]), slots))


def wrapped(rng: Random, text: str) -> str | None:
    """`text` with words around it: an order politely, a question with a lead or with its topic in front."""
    if ORDER.fullmatch(text):
        return capital(fill(rng, pick(rng, sections("rephrase.txt")["order"]), {"q": lower_first(text)[:-1]}))
    if not text.endswith("?"):
        return None
    topic = TOPIC.fullmatch(text)
    subject = (topic["thing"] or topic["doer"]) if topic else "it"
    if subject.split()[-1].lower() not in NO_TOPIC and chance(rng, 0.3):
        slots = {"x": subject, "q": lower_first(text)}
        return capital(fill(rng, pick(rng, sections("rephrase.txt")["topics"]), slots))
    return capital(fill(rng, pick(rng, sections("rephrase.txt")["any question"]), {"q": lower_first(text)}))


def reframed(rng: Random, question: str) -> str | None:
    """`question` in one or two other frames; None where it is neither a question nor an order."""
    if not question[:1].isupper():
        return None
    question = swapped(rng, question) if chance(rng, 0.3) else question
    text = in_frame(rng, question) if chance(rng, 0.85) else None
    if text is None:
        return wrapped(rng, question)
    return (wrapped(rng, text) or text) if chance(rng, 0.12) else text
