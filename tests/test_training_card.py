"""The model card says what the files say, and shows every answer safely."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from training import card
from training.evaluate import LongContext, Results
from training.judge import Reply, Transcript

FENCES = "Here:\n```\n# not a heading\n````\n<b>and</b> more"
RESULTS = Results(
    (
        Transcript("story", 0, (Reply("Tell me a story about a fox.", FENCES, 30, True, False, True),)),
        Transcript("question", 1, (Reply("Why?", "Because.", 2, True, False, False),)),
        Transcript("chat", 2, tuple(Reply(f"Turn {i}", "Yes", 1, i != 2, i == 1, i == 0) for i in range(3))),
    ),
    {"story": 1.25, "all": 1.5},
    {"story": 1.24, "all": 1.49},
    LongContext([1.1, 1.2, 1.3, 1.4], [1.1, 1.2, 1.3, 1.4]),
)
CONFIG = {
    "num_hidden_layers": 7,
    "hidden_size": 640,
    "intermediate_size": 896,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 333,
    "max_position_embeddings": 2048,
    "vocab_size": 4096,
}
QUANTIZATION = {
    "scheme": "int4-g128",
    "bits_per_weight": {"quantized": 4.125},
    "gate": {"worst_error": 0.1234},
}
TRAINING = {
    "parameters": 10_130_000,
    "steps": 11_000,
    "step_tokens": 262_144,
    "tokens": 2_883_584_000,
    "seconds": 1800.0,
    "device": "NVIDIA H100",
    "torch": "2.13.0",
    "quantized_share": 0.2,
    "corpus": {"train_tokens": 300_000_000, "train_conversations": 5_000_000},
}


@pytest.fixture
def facts(tmp_path: Path) -> card.Facts:
    """The facts, by way of the files that hold them."""
    build, original = tmp_path / "build", tmp_path / "original"
    for directory, file, value in (
        (build, "config.json", CONFIG),
        (build, "quantization_card.json", QUANTIZATION),
        (original, "training.json", TRAINING),
        (tmp_path, "results.json", asdict(RESULTS)),
    ):
        directory.mkdir(exist_ok=True)
        (directory / file).write_text(json.dumps(value))
    (build / "model.safetensors").write_bytes(bytes(7_560_000))
    (original / "model-00001-of-00002.safetensors").write_bytes(bytes(20_260_000))
    return card.read_facts(tmp_path / "results.json", build, original)


def test_results_are_read_as_they_were_written(facts: card.Facts) -> None:
    assert facts.results == RESULTS


def test_the_card_states_what_the_files_say(facts: card.Facts) -> None:
    text = "\n\n".join(card.card(facts))
    for stated in ("10.13 million", "7 layers", "640", "333", "7.56 MB", "20.26 MB", "int4-g128", "0.123"):
        assert stated in text
    for stated in ("2,884 million", "30.0 minutes", "NVIDIA H100", "| all | 1.4900 | 1.5000 | +1.01% |"):
        assert stated in text
    assert "| Questions | 1 | 0 | 85% |" in text and "1 answers loop" in text
    assert len(text.splitlines()) <= 120


def test_another_size_or_score_gives_another_card(facts: card.Facts) -> None:
    before = list(card.card(facts))
    for changed in (replace(facts, build_bytes=1), replace(facts, results=replace(RESULTS, transcripts=()))):
        assert list(card.card(changed)) != before


def test_a_rerun_writes_the_same_bytes(facts: card.Facts, tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        card.write(tmp_path / name, card.card(facts))
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()


def test_every_answer_is_shown_and_none_can_leave_its_fence() -> None:
    text = "\n\n".join(card.transcripts(RESULTS))
    for one in RESULTS.transcripts:
        for reply in one.replies:
            assert f"text\n> {reply.prompt}\n" in text and f"text\n{reply.answer}\n" in text
    assert f"`````text\n{FENCES}\n`````" in text
    assert [card.verdict(reply) for reply in RESULTS.transcripts[2].replies] == [
        "passes",
        "loops",
        "has no end",
    ]
    assert card.verdict(RESULTS.transcripts[1].replies[0]) == "does not pass"
