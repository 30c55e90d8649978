"""Longer chats of several parts: a greeting, a name, questions, lists, jokes, stories, thanks, a goodbye."""

from random import Random

from training.talk import memory
from training.talk.answers import beside, question_once
from training.talk.lists import list_once
from training.talk.numbers import small_numbers
from training.talk.refusals import refusal
from training.talk.rewrite import rewriting
from training.talk.smalltalk import about, favorites, feelings, jokes, said, small_talk
from training.talk.tales import story_chat, story_once
from training.talk.templates import Sampler, Turns, chance, pick
from training.talk.words import single_words

SHORT: tuple[Sampler, ...] = (
    question_once, question_once, question_once, jokes, rewriting, feelings,
    *map(beside, (small_talk, about, favorites, list_once, small_numbers, single_words, refusal)),
)  # fmt: skip
ANY: tuple[Sampler, ...] = (*SHORT, story_once, story_once, story_chat)
LONG_CHARACTERS = 5500


def part(rng: Random) -> Turns:
    """One part, nine times in ten a short one."""
    return pick(rng, SHORT if chance(rng, 0.9) else ANY)(rng)


def remembered(rng: Random) -> Turns:
    """Something is told, something else happens, and then it is asked for."""
    return memory.remembering(rng, part)


def mixed(rng: Random) -> Turns:
    """A greeting, one to three parts, and often a thank you or a goodbye."""
    turns = [said(rng, pick(rng, ("greeting", "how", "morning")))] if chance(rng, 0.7) else []
    for _ in range(pick(rng, (1, 1, 2, 3))):
        turns += pick(rng, ANY if chance(rng, 0.3) else SHORT)(rng)
    if chance(rng, 0.5):
        turns.append(said(rng, pick(rng, ("thanks", "bye", "compliment", "night"))))
    return turns


def long_chat(rng: Random) -> Turns:
    """A talk of some 1,300 tokens, in which the user's name is asked for now and then."""
    block = memory.things()[0]
    name = memory.value_of(rng, block)
    turns = [memory.told(rng, block, name)]
    length = 0
    while length < LONG_CHARACTERS:
        turns += pick(rng, ANY)(rng)
        if chance(rng, 0.12):
            turns.append(memory.asked(rng, block, name))
        length = sum(len(user) + len(answer) for user, answer in turns)
    return turns
