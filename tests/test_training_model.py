"""The demo's recipe end to end, small: tokenizer, training in two runs, export, int4 build, answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from models import all_logits, load
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistralcli.conversation import Conversation
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import open_session
from mistralcli.tokenizer import load_tokenizer
from mistralcli.weights import open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.scheme import parse_scheme
from training import tokenizer, train
from training.encoding import BOS, CORPUS_FILE, TOKENIZER_FILE, encode
from training.model import Demo, DemoConfig

LINES = [
    "Once upon a time there was a fox who had a red lantern. The fox lived near the old mill.",
    "Why is the sky blue? Because the air scatters blue light more than red light, on every side.",
    "Thank you! You are welcome. I can tell a story, answer a question, or write a list of 12 things.",
    "- The first tip: drink water. - The second tip: sleep well, and 3 + 4 is 7.",
]
TURNS = [
    ("Why is the sky blue?", "Because the air scatters\nblue light, on every side."),
    ("Thank you!", "Ok."),
]
VOCAB_SIZE = 360
CONFIG = DemoConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=128,
    max_position_embeddings=128,
    sliding_window=16,
)
SCHEDULE = train.Schedule(total_steps=6, seconds=60, batch_rows=4, row_tokens=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training.prepare writes, of the lines above."""
    directory = tmp_path_factory.mktemp("data")
    model = tokenizer.train(iter(LINES * 50), directory, VOCAB_SIZE)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = encode(processor, TURNS) * 30
    np.save(directory / "train.npy", np.array(ids, dtype=np.uint16))
    np.save(directory / "heldout.npy", np.array(ids[:200], dtype=np.uint16))
    (directory / CORPUS_FILE).write_text(json.dumps({"train_tokens": len(ids)}))
    return directory


@pytest.fixture(scope="module")
def exported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("state")
    train.run(data, state, SCHEDULE, CONFIG)
    return state / "export"


def test_both_tokenizers_of_an_export_give_the_ids_of_the_training(exported: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(exported / TOKENIZER_FILE))
    ours, theirs = load_tokenizer(exported), AutoTokenizer.from_pretrained(exported)
    assert (ours.family, ours.version, ours.vocab_size) == ("spm", "v3", VOCAB_SIZE)
    for text in (
        *LINES,
        "Größe  東京, 1234\n\n- a\tb ",
        " led",
        "   ",
        "",
    ):
        assert theirs.encode(text, add_special_tokens=False) == processor.encode(text) == ours.encode(text)
    conversation = Conversation()
    for user, answer in TURNS[:1]:
        conversation = conversation.add("user", user).add("assistant", answer)
    conversation = conversation.add("user", "Why?")
    expected = [*encode(processor, [TURNS[0], ("Why?", "")])][:-1]
    assert ours.encode_chat(conversation) == expected
    messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
    assert theirs.apply_chat_template(messages, return_dict=False) == expected


def test_a_system_prompt_goes_where_mistrals_v3_format_has_it(exported: Path) -> None:
    conversation = Conversation().add("system", "Be brief.").add("user", "Hi.").add("assistant", "Yes?")
    conversation = conversation.add("user", "Why?")
    messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
    theirs = AutoTokenizer.from_pretrained(exported).apply_chat_template(messages, return_dict=False)
    assert theirs == load_tokenizer(exported).encode_chat(conversation)


def test_transformers_reads_an_export_and_gives_the_logits_of_the_trained_model(exported: Path) -> None:
    ids = torch.arange(3, 63)[None] * 5 % VOCAB_SIZE
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    trained = Demo(CONFIG)
    weights = theirs.model.state_dict()
    trained.load_state_dict({name: weights[name] for name in trained.state_dict()})
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        torch.testing.assert_close(trained(ids)[0], expected, atol=1e-4, rtol=1e-4)
        ours = all_logits(load(exported), ids[0].tolist(), chunk=20, slack=7)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert theirs.config.sliding_window == CONFIG.sliding_window < ids.shape[1]
    assert theirs.generation_config.eos_token_id == 2


def test_training_in_two_runs_is_training_in_one(data: Path, exported: Path, tmp_path: Path) -> None:
    trainer = train.start(CONFIG, "cpu")
    ids = train.token_tensor(data / "train.npy", "cpu")
    starts = train.conversation_starts(ids, 32)
    assert (ids[starts] == BOS).all() and len(starts) > 20
    for step in range(3):
        train.train_step(trainer, trainer.model, train.batch_of(ids, starts, step, SCHEDULE), SCHEDULE)
    train.save(trainer, tmp_path / "state.pt")
    log = train.run(data, tmp_path, SCHEDULE, CONFIG)
    assert log["steps"] == 6 and log["losses"][-1][0] == 6
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (tmp_path / "export" / name).read_bytes() == (exported / name).read_bytes()


def test_the_log_says_how_the_model_was_made(exported: Path) -> None:
    log = json.loads((exported / train.LOG_FILE).read_text())
    assert (log["steps"], log["tokens"]) == (6, 6 * 4 * 32)
    assert log["parameters"] == sum(p.numel() for p in Demo(CONFIG).parameters())
    assert log["corpus"]["train_tokens"] and log["seconds"] > 0 and log["device"] == "CPU"


def test_quantized_weights_of_the_training_are_those_of_the_build(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tmp_path / "int4"
    quantize_checkpoint(open_checkpoint(exported), exported, build, parse_scheme(), head_scheme=None)
    trained, theirs = Demo(CONFIG), AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    weights = theirs.model.state_dict()
    trained.load_state_dict({name: weights[name] for name in trained.state_dict()})
    before = trained.layers[1].mlp.up_proj.weight.detach().clone()  # type: ignore[union-attr, operator]
    ids = list(range(20, 60))
    with monkeypatch.context() as patched:
        patched.setenv("MISTRAL_CLI_KERNELS", "reference")  # the CPU's kernels round activations
        built = all_logits(load(build), ids, chunk=40, slack=40)
    with train.as_quantized(trained), torch.no_grad():
        torch.testing.assert_close(trained(torch.tensor([ids]))[0], built, atol=1e-4, rtol=1e-4)
    assert trained.layers[1].mlp.up_proj.weight.equal(before)  # type: ignore[union-attr, operator]
    session = open_session(build, SessionOptions(device="cpu"))
    asked = Conversation().add("user", "Why?")
    answer = session.complete_chat(asked, SamplingParams(seed=1), max_tokens=5)
    assert "".join(answer) == answer.text and answer.finish_reason in ("length", "stop")


def test_the_demo_itself_has_ten_million_parameters_in_groups_of_128() -> None:
    config = DemoConfig()
    assert 8e6 < sum(p.numel() for p in Demo(config).parameters()) < 12e6
    inputs = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    assert not any(size % train.GROUP_SIZE for size in inputs)
