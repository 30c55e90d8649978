"""The corpus: an endless, deterministic stream of conversations, everything in it written for this model.

    python -m training.corpus sample --seed 0 --n 20
    python -m training.corpus write --seed 0 --mb 100 OUT.jsonl

Stories come from training/stories, questions from training/qa, the rest from training/talk. MIXTURE says how
much of the text each kind gets. `heldout_prompts` and `heldout_text` are what the model is judged on.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from random import Random

from training.talk import (
    answers,
    chats,
    heldout,
    lists,
    memory,
    numbers,
    pasted,
    refusals,
    rewrite,
    smalltalk,
    tales,
    words,
)
from training.talk.answers import beside, plain
from training.talk.heldout import Check, Prompt, heldout_prompts, passes
from training.talk.templates import Sampler, Turns

__all__ = ["Check", "Conversation", "Prompt", "conversations", "heldout_prompts", "heldout_text", "passes"]

# kind: share of the characters in percent, and its sampler
MIXTURE: dict[str, tuple[float, Sampler]] = {
    "story": (23.9, tales.story_once),
    "story chat": (10.5, tales.story_chat),
    "question": (23.5, answers.question_once),
    "question chat": (8, answers.question_chat),
    "small talk": (2, beside(smalltalk.small_talk)),
    "about itself": (2, beside(smalltalk.about)),
    "feelings": (1.5, smalltalk.feelings),
    "favorites": (0.5, smalltalk.favorites),
    "jokes": (1, smalltalk.jokes),
    "verses": (1, smalltalk.verses),
    "curious": (0.5, beside(smalltalk.curious)),
    "summary": (1, tales.summary),
    "list": (3, beside(lists.list_once)),
    "list chat": (2, beside(lists.list_chat)),
    "rewriting": (4.5, rewrite.rewriting),
    "words": (1.5, beside(words.single_words)),
    "numbers": (2, beside(numbers.small_numbers)),
    "memory": (4, chats.remembered),
    "not told": (0.5, memory.unknown),
    "refusal": (3, beside(refusals.refusal)),
    "pasted": (1.5, pasted.pasted),
    "odd": (0.5, refusals.odd),
    "crisis": (0.1, refusals.crisis),
    "mixed": (2, chats.mixed),
    "long chat": (1.5, chats.long_chat),
}
# What stands in for a kind in the held-out text.
HELD_OUT: dict[str, Sampler] = {"story": heldout.story_text, "question": heldout.question_text}
N_MEASURED = 150
"""Conversations of a kind that are sampled to learn its mean length."""


@dataclass(frozen=True)
class Conversation:
    kind: str
    turns: Turns


def n_characters(turns: Turns) -> int:
    return sum(len(user) + len(answer) for user, answer in turns)


def mean_length(kind: str, sampler: Sampler) -> float:
    """Characters of a conversation of `kind`."""
    rng = Random(f"length of {kind}")
    return sum(n_characters(sampler(rng)) for _ in range(N_MEASURED)) / N_MEASURED


@cache
def cumulative_weights() -> tuple[float, ...]:
    """Weights for drawing kinds, such that each kind gets its share of the characters."""
    return tuple(accumulate(share / mean_length(kind, sampler) for kind, (share, sampler) in MIXTURE.items()))


@cache
def held_out_phrasings() -> frozenset[str]:
    return frozenset(plain(text) for question in answers.questions() for text in question.held_out)


def is_clean(turns: Turns) -> bool:
    """Does no user turn use a held-out phrasing?"""
    held_out = held_out_phrasings()
    return all(len(user) > 150 or plain(user) not in held_out for user, _ in turns)


def _stream(rng: Random) -> Iterator[Conversation]:
    kinds, weights = tuple(MIXTURE), cumulative_weights()
    while True:
        kind = rng.choices(kinds, cum_weights=weights)[0]
        yield Conversation(kind, MIXTURE[kind][1](rng))


def conversations(seed: int) -> Iterator[Conversation]:
    """Endless training conversations; the same for the same seed."""
    stream, frames = _stream(Random(f"corpus {seed}")), Random(f"frames {seed}")
    clean = (one for one in stream if is_clean(one.turns))
    return (replace(one, turns=pasted.framed(frames, one.turns)) for one in clean)


def heldout_text(n: int) -> Iterator[Conversation]:
    """`n` conversations of all kinds; stories and questions as training never has them."""
    rng = Random("held-out text")
    kinds, weights = tuple(MIXTURE), cumulative_weights()
    for _ in range(n):
        kind = rng.choices(kinds, cum_weights=weights)[0]
        yield Conversation(kind, HELD_OUT.get(kind, MIXTURE[kind][1])(rng))


def show(one: Conversation) -> str:
    turns = (f"  USER  {user}\n  MODEL {answer}" for user, answer in one.turns)
    return f"--- {one.kind}\n" + "\n".join(turns) + "\n"


def write(seed: int, n_bytes: int, path: Path) -> int:
    """Write about `n_bytes` of lines {"turns": [[user, assistant], ...], "kind": ...}; returns how many."""
    written = n_lines = 0
    with path.open("w", encoding="ascii") as file:
        for one in conversations(seed):
            written += file.write(json.dumps({"turns": one.turns, "kind": one.kind}) + "\n")
            n_lines += 1
            if written >= n_bytes:
                return n_lines
    return n_lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="print conversations to read")
    sample.add_argument("--n", type=int, default=20)
    sample.add_argument("--kind", choices=tuple(MIXTURE), help="only this kind")
    to_file = commands.add_parser("write", help="write a part of the corpus")
    to_file.add_argument("--mb", type=float, default=10)
    to_file.add_argument("out", type=Path)
    for command in (sample, to_file):
        command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "write":
        print(f"{write(options.seed, int(options.mb * 1e6), options.out)} conversations in {options.out}")
        return
    stream = conversations(options.seed)
    wanted = (one for one in stream if options.kind in (None, one.kind))
    print("\n".join(map(show, islice(wanted, options.n))))


if __name__ == "__main__":
    main()
