"""A batch whose ids the device chooses: interpreted on the CPU, captured where there is a GPU."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_checkpoint, token_ids
from tokenizer_files import official_file

pytest.importorskip("triton")

from mistralcli.batch import Answer, Job, complete_all
from mistralcli.decoder import Decoder
from mistralcli.engine import ChooseToken, Engine
from mistralcli.errors import IntegrityError
from mistralcli.mistral_tokenizer import MistralTokenizer
from mistralcli.plan import MemoryPlan
from mistralcli.run_options import SamplingParams
from mistralcli.session import Session
from mistralcli.weights import load_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_SEQS, MAX_SEQ_LEN = 3, 32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN is meant where numpy warns of it


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32, "num_hidden_layers": 1}
    random_checkpoint(
        tmp_path, **sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=6, eos_token_id=None
    )
    return open_tiny(tmp_path, N_SEQS)


def open_tiny(directory: Path, n_seqs: int) -> Session:
    """Sequences of a model that windows its past; its vocabulary are the first 96 ids of a real tokenizer."""
    model = load_model(directory, device=DEVICE, dtype=torch.float32)
    engine = Engine(model, max_seq_len=MAX_SEQ_LEN, chunk=8, slack=4, n_seqs=n_seqs, device=DEVICE)
    if engine.decoder is None:
        engine.decoder = Decoder(model, engine.cache)
        engine._prompts = engine._make_prompts()
    tokenizer = MistralTokenizer(official_file("mistral_instruct_tokenizer_240323.model.v3"))
    return Session("tiny", directory, tokenizer, engine, MemoryPlan(MAX_SEQ_LEN, 0, 0, 0, 0), 0.0)


def answers(session: Session, jobs: list[Job]) -> dict[int, Answer]:
    found = list(complete_all(session, jobs))
    assert len(found) == len(jobs)
    return {answer.index: answer for answer in found}


def answers_of_the_host(session: Session, jobs: list[Job]) -> dict[int, Answer]:
    """By a step whose logits `Sampler` chooses from."""
    decoder, session.engine.decoder = session.engine.decoder, None
    try:
        return answers(session, jobs)
    finally:
        session.engine.decoder = decoder


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5, "repeat_penalty": 1.3},
    {"temperature": 0, "repeat_penalty": 1.5},
    {"temperature": 1.2, "top_p": 0.8},
]


def job(index: int, n_answer: int | None, n_prompt: int = 4, **changes: Any) -> Job:
    params = SamplingParams(**PARAMETERS[index % len(PARAMETERS)], seed=50 + index)
    return Job(index, token_ids(n_prompt, seed=index), params, max_tokens=n_answer, **changes)


def test_an_answer_is_what_it_is_alone_whichever_sequences_are_beside_it(session: Session) -> None:
    jobs = [
        job(i, n_answer, n_prompt=3 + 5 * (i % 3)) for i, n_answer in enumerate([2, 5, 4, 4, 3])
    ]  # so that sequences begin while others are in their midst
    together = answers(session, jobs)
    for one in jobs:
        alone = answers(session, [one])[one.index]
        assert together[one.index].token_ids == alone.token_ids
        assert together[one.index].text == alone.text and alone.finish_reason == "length"
        assert len(alone.token_ids) == one.max_tokens
    for index, expected in answers_of_the_host(session, [jobs[0], jobs[3]]).items():
        assert together[index].token_ids == expected.token_ids  # greedy, with and without a penalty


def test_one_seed_gives_the_same_answer_in_every_sequence_and_as_without_a_batch(
    session: Session,
) -> None:
    prompt, params = token_ids(5), SamplingParams(temperature=1.0, seed=7)
    found = answers(session, [Job(i, prompt, params, max_tokens=4) for i in range(N_SEQS)])
    engine = session.engine
    decoder = engine.decoder
    assert decoder is not None
    logits = engine.start({2: prompt})[2]
    expected = []
    decoder.choose_first(2, logits, params, 7, prompt)
    for _ in range(4):
        expected.append(decoder.read().wait()[2])
        decoder.step()
    assert [found[i].token_ids for i in range(N_SEQS)] == [expected] * N_SEQS


def test_one_sequence_at_a_time_gives_the_same_answers(session: Session) -> None:
    jobs = [job(i, 3, n_prompt=3 + 8 * (i % 2)) for i in range(4)]
    together, one_by_one = answers(session, jobs), answers(open_tiny(session.directory, 1), jobs)
    assert [together[i].token_ids for i in range(4)] == [one_by_one[i].token_ids for i in range(4)]


def test_a_sequence_that_stops_is_free_for_the_next_and_nothing_is_left_of_it(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(i, 4) for i in range(4)]
    expected = answers(session, jobs)
    stop_id = expected[0].token_ids[2]
    assert stop_id not in expected[0].token_ids[:2]
    monkeypatch.setattr(session.tokenizer, "eos_ids", frozenset({stop_id}))
    found = answers(session, jobs)
    assert found[0].finish_reason == "stop" and found[0].token_ids == expected[0].token_ids[:2]
    for one in jobs[1:]:
        ids = expected[one.index].token_ids
        assert found[one.index].token_ids == (ids[: ids.index(stop_id)] if stop_id in ids else ids)


def odd_only(seen: list[torch.Tensor]) -> Callable[[ChooseToken], ChooseToken]:
    """Stands around a sampler as a grammar does: no even id may follow. `seen` gets the logits it is asked about."""

    def around(choose: ChooseToken) -> ChooseToken:
        def constrained(logits: torch.Tensor, ids: Sequence[int]) -> int:
            seen.append(logits.cpu().clone())
            masked = logits.clone()
            masked[::2] = -torch.inf
            return choose(masked, ids)

        return constrained

    return around


def test_what_a_grammar_stands_around_is_chosen_here_and_the_others_on_the_device(session: Session) -> None:
    plain = [job(i, n) for i, n in enumerate([5, 3, 4])]
    seen: list[torch.Tensor] = []
    constrained = [job(i, 3, through=[odd_only(seen)]) for i in (3, 8)]  # with and without a penalty, greedy
    expected = answers(session, plain) | answers_of_the_host(session, constrained)
    seen.clear()
    jobs = [plain[0], constrained[0], plain[1], constrained[1], plain[2]]
    found = answers(session, jobs)
    for one in jobs:
        assert found[one.index].token_ids == expected[one.index].token_ids
    assert all(token_id % 2 for one in constrained for token_id in found[one.index].token_ids)
    assert len(seen) == 2 * 3


def test_a_grammar_alone_is_as_without_the_device(session: Session) -> None:
    constrained = [job(i, 3, through=[odd_only([])]) for i in range(4)]
    expected = answers_of_the_host(session, constrained)
    found = answers(session, constrained)
    assert [found[i].token_ids for i in range(4)] == [expected[i].token_ids for i in range(4)]


@torch.no_grad()
def test_a_sequence_whose_logits_are_no_numbers_fails_alone(session: Session) -> None:
    jobs = [job(0, 6), job(1, 4), job(2, 3), job(4, 3)]
    expected = answers(session, jobs)
    ids = expected[0].token_ids
    others = {i for one in jobs[1:] for i in [*one.token_ids, *expected[one.index].token_ids]}
    n_good, bad = next(
        (n, i) for n, i in enumerate(ids[:-1], 1) if i not in {*others, *jobs[0].token_ids, *ids[: n - 1]}
    )
    damaged = next(i for i in range(3, 96) if i not in {*others, *jobs[0].token_ids, *ids})
    session.engine.model.tok_embeddings.weight[[bad, damaged]] = torch.nan
    from_the_start = Job(20, [5, damaged], SamplingParams(temperature=0), max_tokens=6)
    found = answers(session, [jobs[0], from_the_start, *jobs[1:]])
    assert isinstance(found[0].error, IntegrityError) and found[0].token_ids == ids[:n_good]
    assert isinstance(found[20].error, IntegrityError) and found[20].token_ids == []
    for one in jobs[1:]:
        assert found[one.index].token_ids == expected[one.index].token_ids
        assert found[one.index].error is None


def test_a_context_is_filled_to_its_end_and_no_step_is_made_for_what_has_no_next(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = session.engine.decoder
    assert decoder is not None
    steps: list[int] = []
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda: (steps.append(int(decoder._cache.last.max())), step()))
    full = job(0, None, n_prompt=MAX_SEQ_LEN - 3)
    found = answers(session, [full, job(1, 3), job(2, 0)])
    assert [len(found[i].token_ids) for i in range(3)] == [3, 3, 0]
    assert {one.finish_reason for one in found.values()} == {"length"}
    assert len(steps) == 2  # an id of three follows the prompt
    # The full one is idle while another goes on, and one that begins in its place is what it is elsewhere.
    again = answers(session, [full, job(1, 8), job(3, 3), job(8, 3)])
    assert max(steps) == MAX_SEQ_LEN - 2  # which is the step too far, into the last position
    assert again[0].token_ids == found[0].token_ids
    assert again[8].token_ids == answers(session, [job(8, 3)])[8].token_ids
