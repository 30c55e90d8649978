"""Chunks at fixed addresses against the plain forward pass: as they run on the CPU, captured where there is a GPU."""

from pathlib import Path

import pytest
import torch
from models import random_checkpoint

pytest.importorskip("triton")

from mistralcli import prefill
from mistralcli.cache import KVCache
from mistralcli.model import Transformer
from mistralcli.prefill import CapturedForward, CapturedPrompts
from mistralcli.weights import load_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_SEQ_LEN, SLACK, CHUNK = 64, 3, 11


@pytest.fixture(params=[None, 6])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(prefill, "LENGTHS", (2, 4, 8))
    random_checkpoint(tmp_path, num_hidden_layers=2, head_dim=32, sliding_window=request.param)
    return load_model(tmp_path, device=DEVICE, dtype=torch.float32)


def cache_of(model: Transformer, n_seqs: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(
        model.config, max_seq_len=MAX_SEQ_LEN, n_seqs=n_seqs, slack=SLACK, dtype=dtype, device=DEVICE
    )


def chunks_of(n_tokens: list[int], n_seqs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and positions of chunks of so many tokens, one behind the other; the last sequence ends two tokens early."""
    torch.manual_seed(0)
    total = sum(n_tokens)
    positions = torch.arange(total).repeat(n_seqs, 1)
    positions[-1, total - 2 :] = -1
    ids = torch.randint(64, (n_seqs, total))
    return list(zip(ids.split(n_tokens, dim=1), positions.split(n_tokens, dim=1), strict=True))


@pytest.mark.parametrize("n_seqs", [1, 2])
@torch.no_grad()
def test_chunks_of_every_length_give_the_hidden_states_of_the_model(model: Transformer, n_seqs: int) -> None:
    captured_cache, plain_cache = cache_of(model, n_seqs), cache_of(model, n_seqs)
    captured = CapturedForward(model, captured_cache, CHUNK)
    # Each length three times: as it is, captured, replayed; 9 and 10 lie between the last graph and a whole chunk.
    lengths = [1, 3, 8, CHUNK, 9, 2, 4, 7, 1, 3, 10]
    for ids, positions in chunks_of(lengths, n_seqs):
        hidden = captured(ids, positions)
        expected = model(ids.to(DEVICE), positions, plain_cache)
        seen = positions >= 0
        torch.testing.assert_close(hidden[seen], expected[seen], atol=2e-5, rtol=1e-5)
        assert captured_cache.last.tolist() == plain_cache.last.tolist()


@torch.no_grad()
def test_rewinding_is_possible_as_far_as_after_plain_chunks(model: Transformer) -> None:
    cache, plain_cache = cache_of(model, 1), cache_of(model, 1)
    captured = CapturedForward(model, cache, CHUNK)
    first, second = chunks_of([8, 8], 1)
    for ids, positions in (first, second):
        before = captured(ids, positions).clone()
        model(ids.to(DEVICE), positions, plain_cache)
    can = [cache.can_rewind(n) for n in range(16)]
    assert can == [plain_cache.can_rewind(n) for n in range(16)]
    cache.rewind(0)
    captured(*first)
    torch.testing.assert_close(captured(*second)[:, :6], before[:, :6], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_chunk_beyond_the_context_is_refused(model: Transformer) -> None:
    captured = CapturedForward(model, cache_of(model, 1), CHUNK)
    positions = torch.arange(MAX_SEQ_LEN - 1, MAX_SEQ_LEN + 1)[None]
    with pytest.raises(AssertionError, match=f"position {MAX_SEQ_LEN} in a cache of {MAX_SEQ_LEN}"):
        captured(torch.zeros(1, 2, dtype=torch.int64), positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("chunk", [3, CHUNK])
@torch.no_grad()
def test_a_prompt_is_in_its_place_as_if_it_had_been_run_there(
    model: Transformer, dtype: torch.dtype, chunk: int
) -> None:
    cache, plain_cache = (cache_of(model, 3, dtype) for _ in "ab")
    prompts = CapturedPrompts(model, cache, chunk)
    most = 8 if any(ring.sliding_window for ring in cache.rings) else MAX_SEQ_LEN
    assert prompts.most_tokens == most  # a ring of 6 + 3 − 1 slots, or the context
    for cache_ in (cache, plain_cache):
        cache_.reserve(MAX_SEQ_LEN)
    torch.manual_seed(0)
    # Each length as it is, captured and replayed; shorter ones where longer ones have been.
    for index, n_tokens in [(0, 7), (2, 5), (1, 8), (0, 6), (2, 8), (2, 1), (1, 7), (0, 2)]:
        ids = torch.randint(64, (1, n_tokens))
        hidden = prompts(index, ids[0].tolist())
        one = plain_cache.sequence(index, n_tokens)
        expected = model(ids.to(DEVICE), torch.arange(n_tokens)[None], one)
        # A float32 that differs in its last bit may be rounded to the next code.
        atol = 1e-2 if dtype == torch.int8 else 2e-5
        torch.testing.assert_close(hidden, expected[0, -1], atol=atol, rtol=1e-5)
        assert cache.last.tolist() == plain_cache.last.tolist() and cache.furthest == plain_cache.furthest
        for layer, plain_layer in zip(cache.layers, plain_cache.layers, strict=True):
            plain = plain_layer.buffers()
            for name, buffer in layer.buffers().items():
                atol = 1 if buffer.dtype == torch.int8 else 2e-5
                torch.testing.assert_close(buffer, plain[name], atol=atol, rtol=1e-5)
