"""The facts of a story as short phrases, and its summary and sequel.

Grammatical forms of the facts:

    name         "Ruby", "Pip and Dot"
    kind         "fox", "two mice"
    he, him, his the hero's pronouns; was: "was" or "were"
    object       "lantern" (a noun without an article)
    object_full  "a brass lantern"
    place        "in the forest" (with its preposition)
    friend       "Olive the owl", "a girl named Mia"
    friend_name, friend_kind
    problem      a clause in the past: "Ruby lost the lantern"
    reason       a clause that may follow "because": "there was a small hole in her bag"
    feeling      an adjective, how the hero felt about the problem: "sad"
    solution     a clause: "Ruby asked Olive the owl for help and looked under a fern"
    ending       a clause: "Ruby found the lantern under a fern"
    feeling_end  an adjective: "happy"
    lesson       a clause that may follow "that": "looking carefully is better than worrying"
"""

import random

from training.stories.cast import Cast
from training.stories.plotfile import PHRASES, Plot

SLOT_FACTS = {
    "name": "n",
    "kind": "kind",
    "he": "he",
    "him": "him",
    "his": "his",
    "was": "was",
    "object": "noun",
    "object_full": "ao",
    "place": "in_the",
    "friend": "fi",
    "friend_name": "fn",
    "friend_kind": "fkind",
}
RENAMED = {"start": "feeling", "finish": "feeling_end"}


def add_picks(rng: random.Random, cast: Cast, plot: Plot, slots: dict[str, str]) -> None:
    """Chooses the plot's parameters and phrases and adds them to `slots`."""
    chosen: dict[str, str] = {}
    for pick in plot.picks:
        row = rng.choice(pick.rows)
        chosen |= {slot: cell.format_map(slots) for slot, cell in zip(pick.slots, row, strict=True)}
    slots |= chosen
    for key in PHRASES:
        chosen[key] = slots[key] = rng.choice(plot.phrases[key]).format_map(slots)
    chosen["sad"], chosen["glad"] = chosen["start"], chosen["finish"]
    slots |= chosen
    slots.update(("^" + key, value[:1].upper() + value[1:]) for key, value in chosen.items())


def facts_of(slots: dict[str, str]) -> dict[str, str]:
    facts = {fact: slots[slot] for fact, slot in SLOT_FACTS.items()}
    return facts | {RENAMED.get(key, key): slots[key] for key in PHRASES}
