"""The float32 reference path agrees with transformers, for every kind of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import all_logits, load, random_checkpoint, token_ids

from mistralcli.engine import Engine
from mistralcli.weights import open_checkpoint

TOLERANCE = 1e-4

ATTENTION_KINDS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "heads wider than dim": {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3},
    "tied embeddings": {"tie_word_embeddings": True},
    "window": {"sliding_window": 7},
    "window of one": {"sliding_window": 1},
    "window, multi-query, theta 1e6": {
        "sliding_window": 13,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "window by layer": {
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_logits_agree_with_transformers_over_several_windows(kind: str, tmp_path: Path) -> None:
    theirs = random_checkpoint(tmp_path, **ATTENTION_KINDS[kind])
    ids = token_ids(61)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    for chunk, slack in ((61, 61), (16, 5), (1, 1)):
        logits = all_logits(load(tmp_path), ids, chunk=chunk, slack=slack)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_widened_exactly(dtype: str, tmp_path: Path) -> None:
    theirs = random_checkpoint(tmp_path, dtype=dtype, sliding_window=7)
    ids = token_ids(30)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        all_logits(load(tmp_path), ids, chunk=30, slack=8), expected, atol=TOLERANCE, rtol=0
    )


def test_shards_with_an_index_give_the_same_model_as_one_file(tmp_path: Path) -> None:
    theirs = random_checkpoint(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    one, shards = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "shards")
    assert one.names() == shards.names()
    assert all(torch.equal(one.load(name), shards.load(name)) for name in one.names())


def test_generated_text_scored_again_has_the_same_logprobs(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, sliding_window=11)
    model = load(tmp_path)
    prompt, step_logprobs = token_ids(9), []

    def greedy(logits: torch.Tensor, so_far: Any) -> int:
        step_logprobs.append(logits.log_softmax(-1).max())
        return int(logits.argmax())

    engine = Engine(model, max_seq_len=64, chunk=4, slack=3)
    completion = list(engine.generate(prompt, greedy, max_tokens=40))
    rescored = all_logits(model, prompt + completion, chunk=49, slack=49).log_softmax(-1)
    scores = [rescored[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]
    assert len(completion) == 40
    torch.testing.assert_close(torch.stack(step_logprobs), torch.stack(scores), atol=TOLERANCE, rtol=0)


def test_a_batch_of_prompts_of_different_lengths_equals_each_alone(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, sliding_window=7)
    model = load(tmp_path)
    prompts = [token_ids(n, seed=n) for n in (1, 23, 9)]
    steps = [token_ids(3, seed=50 + i) for i in range(20)]
    batch = Engine(model, max_seq_len=48, chunk=5, slack=4, n_seqs=3)
    together = [batch.prefill(prompts), *(batch.step(ids).clone() for ids in steps)]
    for i, prompt in enumerate(prompts):
        ids = prompt + [step[i] for step in steps]
        alone = all_logits(model, ids, chunk=len(ids), slack=len(ids))[len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack([row[i] for row in together]), alone, atol=TOLERANCE, rtol=0)
