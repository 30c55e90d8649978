"""The float32 path on a real checkpoint: the golden ids and the golden perplexity of transformers."""

import json
from pathlib import Path

import pytest
from models import mean_nll

from mistralcli.conversation import Conversation, Message
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import Session, open_session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session(smollm2_dir: Path) -> Session:
    return open_session(smollm2_dir, SessionOptions(kv="float32"))


def test_greedy_answers_are_the_golden_ids(session: Session, shared_dir: Path) -> None:
    golden = json.loads((shared_dir / "data" / "smollm2_golden.json").read_text())["greedy"]
    for case in golden["cases"]:
        conversation = Conversation.of(Message(m["role"], m["content"]) for m in case["messages"])
        assert session.tokenizer.encode_chat(conversation) == case["prompt_ids"]
        completion = session.complete_chat(
            conversation, SamplingParams(temperature=0), max_tokens=golden["max_new_tokens"]
        )
        text = "".join(completion)
        eos = list(session.config.eos_ids) if completion.finish_reason == "stop" else []
        assert completion.token_ids + eos == case["output_ids"]
        assert text == session.tokenizer.decode(completion.token_ids)


def test_the_loss_on_wikitext_is_the_golden_one(session: Session, shared_dir: Path) -> None:
    golden = json.loads((shared_dir / "data" / "smollm2_golden.json").read_text())["wikitext2_test_nll"]
    text = (shared_dir / "data" / golden["file"]).read_text(encoding="utf-8")[: golden["chars_covered"]]
    ids = session.tokenizer.encode(text)[:4096]
    assert ids[-4:] == golden["last_4_ids"]
    model = session.engine.model
    losses = [mean_nll(model, ids[start : start + 512]) for start in range(0, 4096, 512)]
    assert mean_nll(model, ids) == pytest.approx(golden["one_window_4096"]["mean_nll"], abs=1e-4)
    assert sum(losses) / 8 == pytest.approx(golden["windows_of_512_no_overlap"]["mean_nll"], abs=1e-4)
