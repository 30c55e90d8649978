"""What the model is judged on: 100 prompts that no training conversation contains, with their checks.

Stories combine heroes with objects and plots that training never combines; questions come in phrasings
that training never uses; names in chats are not in any list. This is the fifth set: the earlier ones were read
while the corpus was improved, so their questions are judged no more. The key facts of its questions were reviewed
before any model had answered them: a key fact is what an answer to the held-out phrasing must say to be right, so
what only another phrasing of the block asks, or what decorates an answer, is none.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from training.stories import HELD_OUT, Story, sample_about
from training.stories.plotfile import Plot, plots
from training.stories.words import Kind, kinds, things
from training.talk.answers import Question, questions, says
from training.talk.lists import topics
from training.talk.memory import HELD_OUT_NAMES
from training.talk.templates import Turns, pick

SEED = "held out, fifth set"
FIRST_QUESTION = 500
"""Where the judged questions begin in `hard_questions`; those of earlier sets are below 466."""
OBJECT_MODES = ("with_object",)
PLOT_MODES = ("does", "named_does")
SENTENCE_END = re.compile(r"(?<=[.!?\"])\s+")
NAME = re.compile(r"\b[A-Z][a-z]+")
NO_NAMES = frozenset(
    {
        "The",
        "He",
        "She",
        "They",
        "It",
        "And",
        "But",
        "Then",
        "One",
        "So",
        "In",
        "At",
        "Once",
        "Far",
        "Beside",
        "Everyone",
        "There",
        "This",
        "That",
    }
)
N_STORIES, N_QUESTIONS, N_CHATS = 40, 45, 15


@dataclass(frozen=True)
class Check:
    """What an answer must say, in any case.

    All of `contains`, and the key facts of `keys`. The `hero` of a story (a kind, "fox"), with its `name`
    where the request gave one: it is named, and still is in the last third, as is its `thing`. `n_items` is
    the length of a list.
    """

    contains: tuple[str, ...] = ()
    hero: str = ""
    name: str = ""
    thing: str = ""
    keys: str = ""
    n_items: int = 0


@dataclass(frozen=True)
class Prompt:
    """User turns of one conversation, each with the check of its answer."""

    kind: str  # "story", "question" or "chat"
    turns: tuple[tuple[str, Check], ...]


def names(word: str, text: str) -> bool:
    """Is the word in the text as a word of its own, in any case, also in the plural?"""
    return re.search(rf"\b{re.escape(word)}(e?s)?\b", text, re.IGNORECASE) is not None


def hero_stays(check: Check, answer: str) -> bool:
    """Is the hero there, and still named in the last third: by the name asked for, else by any of its own?"""
    own = [check.name] if check.name else [check.hero, *names_beside(check.hero, answer)]
    return names(check.hero, answer) and any(names(name, ending(answer)) for name in own)


def names_beside(hero: str, answer: str) -> list[str]:
    """The names in the sentence that first speaks of the hero, or else in those around it."""
    sentences = SENTENCE_END.split(answer)
    at = next((at for at, sentence in enumerate(sentences) if names(hero, sentence)), len(sentences))
    around = (" ".join(sentences[at : at + 1]), " ".join(sentences[max(0, at - 1) : at + 2]))
    found = ([name for name in NAME.findall(text) if name not in NO_NAMES] for text in around)
    return next(filter(None, found), [])


def ending(answer: str) -> str:
    """The last third of it."""
    return answer[len(answer) * 2 // 3 :]


def passes(check: Check, answer: str) -> bool:
    text = answer.lower()
    items = [line for line in answer.splitlines() if line[:1] == "-" or line[:1].isdigit()]
    return (
        all(part.lower() in text for part in check.contains)
        and (not check.hero or hero_stays(check, answer))
        and (not check.thing or names(check.thing, ending(answer)))
        and (not check.keys or says(answer, check.keys))
        and check.n_items in (0, len(items))
    )


def _hash(pair: tuple[str, str]) -> int:
    return zlib.crc32("|".join(pair).encode())


def suits(kind: Kind, plot: Plot) -> bool:
    zones = plot.zones & set(kind.zones)
    return bool(zones) and plot.needs <= kind.tags and not plot.without & kind.tags


@cache
def object_pairs() -> tuple[tuple[str, str], ...]:
    """Held-out pairs of one hero and an object that it can carry, in a fixed order."""
    found = (
        (hero, other)
        for hero, other in HELD_OUT
        if other in things()
        and not things()[other].tags & {"big", "odd"}
        and "plural" not in kinds()[hero].tags
    )
    return tuple(sorted(found, key=_hash))


@cache
def plot_pairs() -> tuple[tuple[str, str], ...]:
    """Held-out pairs of one hero and a plot that suits it."""
    found = []
    for hero, other in HELD_OUT:
        kind, plot = kinds()[hero], plots().get(other)
        if plot and "plural" not in kind.tags and suits(kind, plot):
            found.append((hero, other))
    return tuple(sorted(found, key=_hash))


def story(rng: Random, by_plot: bool, mode: str) -> Story:
    """A story of a held-out pair."""
    if by_plot:
        hero, plot = pick(rng, plot_pairs())
        return sample_about(rng, hero=hero, plot=plot, mode=mode)
    hero, thing = pick(rng, object_pairs())
    return sample_about(rng, hero=hero, obj=thing, mode=mode)


def story_check(told: Story) -> Check:
    """The hero, by name where the request names it, and the object where it asks for one."""
    return Check(hero=told.hero, name=told.hero_name if "name" in told.asked else "", thing=told.object or "")


def story_prompt(rng: Random, index: int) -> Prompt:
    by_plot = index % 3 == 2
    told = story(rng, by_plot, pick(rng, PLOT_MODES if by_plot else OBJECT_MODES))
    return Prompt("story", ((told.request, story_check(told)),))


@cache
def hard_questions() -> tuple[Question, ...]:
    """Questions with a held-out phrasing, in the order of a hash."""
    found = [question for question in questions() if question.held_out and question.keys]
    return tuple(sorted(found, key=lambda question: zlib.crc32(question.held_out[0].encode())))


def question_prompt(index: int) -> Prompt:
    question = hard_questions()[FIRST_QUESTION + index]
    return Prompt("question", ((question.held_out[0], Check(keys=question.keys)),))


def name_chat(index: int) -> Prompt:
    """A name, a question, and the name again."""
    name, question = HELD_OUT_NAMES[index], hard_questions()[FIRST_QUESTION + N_QUESTIONS + index]
    middle = (question.held_out[0], Check(keys=question.keys))
    hello, again = Check(contains=(name,)), Check(contains=(name,))
    return Prompt("chat", ((f"Hi, my name is {name}.", hello), middle, ("What is my name?", again)))


def story_chat(rng: Random, index: int) -> Prompt:
    """A story, a question about its hero, and what happened next."""
    told = story(rng, False, "with_object")
    while "name" not in told.asked:
        told = story(rng, False, "with_object")
    name = Check(contains=(told.hero_name,))
    after = ("What happened next?", "Make it shorter.")[index % 2]
    asks = f"What was the {told.hero}'s name?"
    return Prompt("chat", ((told.request, story_check(told)), (asks, name), (after, name)))


def question_chat(index: int) -> Prompt:
    """Two questions and thanks."""
    start = FIRST_QUESTION + 60 + 2 * index
    first, second = hard_questions()[start : start + 2]
    turns = [(question.held_out[0], Check(keys=question.keys)) for question in (first, second)]
    return Prompt("chat", (*turns, ("Thank you!", Check())))


def list_chat(index: int) -> Prompt:
    """Advice, one more piece of it, and which matters most."""
    topic = [topic for topic in topics() if topic.best][7 * index + 3]
    most = Check(contains=(topic.best.split(" matter")[0],))
    return Prompt(
        "chat",
        (
            (f"Could you give me four {topic.things}?", Check(n_items=4)),
            ("One more, please.", Check()),
            ("Which one is the most important?", most),
        ),
    )


def heldout_prompts(n: int = 100) -> tuple[Prompt, ...]:
    """The fixed set: 40 stories, 45 questions, 15 chats; the first `n` of them, kinds in turn."""
    rng = Random(SEED)
    stories = [story_prompt(rng, index) for index in range(N_STORIES)]
    asked = [question_prompt(index) for index in range(N_QUESTIONS)]
    chats = [name_chat(index) for index in range(5)] + [story_chat(rng, index) for index in range(5)]
    chats += [question_chat(index) for index in range(3)] + [list_chat(index) for index in range(2)]
    return tuple(_in_turn((stories, asked, chats)))[:n]


def _in_turn(groups: Sequence[Sequence[Prompt]]) -> Iterator[Prompt]:
    """All prompts, the groups mixed in proportion to their sizes."""
    ranked = [
        ((place + 0.5) / len(group), at, prompt)
        for at, group in enumerate(groups)
        for place, prompt in enumerate(group)
    ]
    return (prompt for _, _, prompt in sorted(ranked, key=lambda entry: entry[:2]))


def story_text(rng: Random) -> Turns:
    """A held-out story with its request."""
    told = story(rng, False, pick(rng, ("with_object", "object", "kind", "named")))
    return [(told.request, told.text)]


def question_text(rng: Random) -> Turns:
    """A held-out phrasing with one of its answers."""
    question = pick(rng, hard_questions())
    return [(pick(rng, question.held_out), pick(rng, question.answers))]
