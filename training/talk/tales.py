"""Stories, and chats about them: shorter, what happened next, why, who, another one, one about an owl."""

import re
from collections.abc import Mapping
from dataclasses import replace
from random import Random

from training.stories import HELD_OUT, Story, sample_about
from training.stories import sample as sample_story
from training.talk.memory import made_up
from training.talk.noise import terse
from training.talk.smalltalk import said
from training.talk.templates import Turn, Turns, article, chance, fill, pairs, pick, request

FACTS = ("where", "friend", "thing", "problem", "problem", "reason", "solution", "ending", "lesson")
NEW = ("another", "instead")
RENAMED = 0.45
"""How often a hero whose name is asked for has one that no list knows, so that names are copied and not guessed."""
# By how often people ask: a shorter or a longer story, a fact, a new story.
FOLLOW_UPS = ("shorter",) * 3 + ("next",) * 3 + ("hero",) * 3 + FACTS + ("another",) * 2 + ("instead",) * 2


def is_plural(story: Story) -> bool:
    return story.facts["was"] == "were"


def with_name(story: Story, name: str) -> Story:
    """`story` with another name for its only hero."""
    old = re.compile(rf"\b{story.hero_name}\b")
    typed = name if old.search(story.request) else name.lower()
    return replace(
        story,
        request=re.sub(old.pattern, typed, story.request, flags=re.IGNORECASE),
        text=old.sub(name, story.text),
        hero_name=name,
        facts={key: old.sub(name, fact) for key, fact in story.facts.items()},
        summary=old.sub(name, story.summary),
        sequel=old.sub(name, story.sequel),
    )


def name_is_no_word(story: Story) -> bool:
    """Does the hero's name, in any case, stand for nothing else in the request and the story?"""
    low = rf"\b{story.hero_name.lower()}\b"
    return len(re.findall(low, story.request.lower())) == 1 and not re.search(low, story.text + story.sequel)


def sample(rng: Random) -> Story:
    """A story for training."""
    story = sample_story(rng)
    if "name" in story.asked and not is_plural(story) and chance(rng, RENAMED) and name_is_no_word(story):
        return with_name(story, made_up(rng))
    return story


def slots_of(story: Story) -> Mapping[str, str]:
    """The facts, and what the templates of tales.txt need besides."""
    facts = story.facts
    name, problem = facts["name"], facts["problem"]
    begins = problem.startswith(name + " ")
    return facts | {
        "a_kind": facts["kind"] if is_plural(story) else article(facts["kind"]),
        "the": f"the {facts['kind']}",
        "pronoun_problem": facts["he"] + problem[len(name) :] if begins else problem,
        "summary": story.summary,
        "sequel": story.sequel,
        "text": story.text,
    }


def ask(rng: Random, story: Story, heading: str) -> Turn:
    """One question of tales.txt about `story` with its answer."""
    if heading == "hero":
        heading = "more heroes" if is_plural(story) else "one hero"
    question, answer = pick(rng, pairs("tales.txt", heading))
    slots = slots_of(story)
    return terse(rng, fill(rng, question, slots)), fill(rng, answer, slots)


def is_held_out(story: Story) -> bool:
    return not HELD_OUT.isdisjoint({(story.hero, story.plot), (story.hero, story.facts["object"])})


def same_kind(rng: Random, story: Story) -> Story:
    """Another story for training about a hero of the same kind."""
    while True:
        other = sample_about(rng, hero=story.hero)
        if not is_held_out(other):
            return other


def story_once(rng: Random) -> Turns:
    story = sample(rng)
    return [(story.request, story.text)]


def summary(rng: Random) -> Turns:
    """A story that the user brings along, and what it is about in a few words."""
    story = sample(rng)
    text = story.text.replace("\n\n", " ") if chance(rng, 0.7) else story.text
    return [(request(rng, "summary", text), story.summary)]


def story_chat(rng: Random) -> Turns:
    """A story and one to three turns about it; a new story becomes what is talked about."""
    story = sample(rng)
    turns = [(story.request, story.text)]
    done: set[str] = set()
    for _ in range(pick(rng, (1, 1, 2, 2, 3))):
        heading = pick(rng, FOLLOW_UPS)
        if heading in done:
            continue
        done.add(heading)
        if heading in NEW:
            story = same_kind(rng, story) if heading == "another" else sample(rng)
            done = {"instead"}
        turns.append(ask(rng, story, heading))
    if chance(rng, 0.12):
        turns.append(said(rng, pick(rng, ("thanks", "good-story"))))
    return turns
