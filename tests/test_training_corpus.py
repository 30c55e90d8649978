"""The corpus is the same for a seed, keeps what is held out to itself, and is tokenized as it was sampled."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from training import prepare, tokenizer
from training.corpus import (
    MIXTURE,
    Conversation,
    conversations,
    held_out_phrasings,
    heldout_prompts,
    heldout_text,
    is_clean,
    n_characters,
)
from training.encoding import BOS, CORPUS_FILE, EOS, TOKENIZER_FILE, encode
from training.talk.answers import plain, questions

N_SAMPLED = 3000


@pytest.fixture(scope="module")
def sampled() -> list[Conversation]:
    return list(islice(conversations(7), N_SAMPLED))


def user_turns(some: list[Conversation]) -> Iterator[str]:
    return (user for one in some for user, _ in one.turns)


def test_the_same_seed_gives_the_same_corpus_and_another_gives_another(sampled: list[Conversation]) -> None:
    assert list(islice(conversations(7), 300)) == sampled[:300]
    assert list(islice(conversations(8), 300)) != sampled[:300]
    assert list(heldout_text(50)) == list(heldout_text(50))


def test_every_turn_says_something(sampled: list[Conversation]) -> None:
    for one in sampled:
        assert one.turns and all(text.strip() for turn in one.turns for text in turn), one


def test_every_kind_comes_in_about_its_share_of_the_characters() -> None:
    counts = dict.fromkeys(MIXTURE, 0)
    for one in islice(conversations(9), 6000):
        counts[one.kind] += n_characters(one.turns)
    total = sum(share for share, _ in MIXTURE.values())
    for kind, (share, _) in MIXTURE.items():
        if share > 2.4:
            assert counts[kind] / sum(counts.values()) == pytest.approx(share / total, rel=0.25), kind


def test_no_training_conversation_uses_a_held_out_phrasing(sampled: list[Conversation]) -> None:
    held_out = held_out_phrasings()
    assert len(held_out) > 100
    assert not [user for user in user_turns(sampled) if plain(user) in held_out]


def test_a_held_out_phrasing_is_found_out_in_any_turn_and_writing() -> None:
    text = next(question.held_out[0] for question in questions() if question.held_out)
    hello = ("Hello!", "Hello to you.")
    assert is_clean([hello])
    for written in (text, text.upper(), f"  {text} "):
        assert not is_clean([hello, (written, "An answer.")])


def test_held_out_questions_and_stories_are_those_that_training_never_has(
    sampled: list[Conversation],
) -> None:
    held_out, asked = held_out_phrasings(), set(map(plain, user_turns(sampled)))
    for prompt in heldout_prompts():
        first = plain(prompt.turns[0][0])
        if prompt.kind == "question":
            assert first in held_out
        if prompt.kind != "chat":
            assert first not in asked
    for one in heldout_text(300):
        if one.kind == "question":
            assert plain(one.turns[0][0]) in held_out


def test_a_part_is_the_sampled_conversations_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PART_TOKENS", 3000)
    model = tokenizer.train(tokenizer.sampled_lines(400), tmp_path / "tokenizer", vocab_size=700)
    facts = prepare.prepare(model, tmp_path / "data", n_parts=2, n_workers=1, n_heldout=20)
    ids = np.load(tmp_path / "data" / "train.npy").tolist()
    assert facts == json.loads((tmp_path / "data" / CORPUS_FILE).read_text())
    assert len(ids) == facts["train_tokens"] and ids[0] == BOS and ids[-1] == EOS
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected: list[int] = []
    for part in range(2):
        stream, n_before = conversations(prepare.FIRST_SEED + part), len(expected)
        while len(expected) - n_before < 3000:
            conversation = encode(processor, next(stream).turns)
            expected += [] if prepare.repeats_itself(conversation) else conversation
    assert ids == expected
    assert (tmp_path / "data" / TOKENIZER_FILE).read_bytes() == model.read_bytes()


def test_a_conversation_repeats_itself_when_a_run_of_four_ids_comes_more_than_three_times() -> None:
    run = [5, 6, 7, 8]
    assert not prepare.repeats_itself([1, 2, 3])
    assert not prepare.repeats_itself([*run, 1, *run, 2, *run, 3])
    assert prepare.repeats_itself([*run, 1, *run, 2, *run, 3, *run])
    assert prepare.repeats_itself([9] * 7)


def test_a_part_that_is_there_is_kept(tmp_path: Path) -> None:
    prepare.save(prepare.part_path(tmp_path, 3), [1, 5, 2])
    prepare.write_part((tmp_path / "no tokenizer", tmp_path, 3))
    assert np.load(prepare.part_path(tmp_path, 3)).tolist() == [1, 5, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["part-0003.npy"]
