"""The rolling-buffer cache: the ring equals the full mask, whatever the window, the chunks and the lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MISTRAL_7B, load, random_checkpoint, token_ids

from mistralcli.cache import GROWTH_SLOTS, KVCache, Ring, Seen, cache_size_bytes, quantized
from mistralcli.config import ModelConfig
from mistralcli.engine import Engine
from mistralcli.errors import ContextOverflowError
from mistralcli.model import Transformer
from mistralcli.ops import attention


def greedy(logits: torch.Tensor, so_far: object) -> int:
    return int(logits.argmax())


def next_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """The logits after a prompt, (vocab_size,)."""
    rows: list[torch.Tensor] = []
    list(engine.generate(ids, lambda row, _: rows.append(row) or 0, max_tokens=1))
    return rows[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("windowed")
    random_checkpoint(directory, sliding_window=9, layer_types=["full_attention", *["sliding_attention"] * 2])
    return load(directory)


@given(
    window=st.integers(1, 12),
    slack=st.integers(1, 12),
    max_seq_len=st.integers(1, 40),
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=12),
)
def test_the_ring_sees_exactly_the_window_after_any_writes(
    window: int, slack: int, max_seq_len: int, pieces: list[int]
) -> None:
    """Play the ring with labelled slots: what a query sees is what the full mask says, held where it says."""
    ring = Ring.of(window, max_seq_len, slack)
    slots: dict[int, int] = {}
    start = 0
    for n_tokens in pieces:
        stop = min(start + min(n_tokens, slack), max_seq_len)
        if stop == start:
            break
        slots |= {position % ring.capacity: position for position in range(start, stop)}
        positions = torch.arange(start, stop)[None]
        mask = Seen(positions, ring, min(stop, ring.capacity)).mask[0]
        for query, row in zip(range(start, stop), mask, strict=True):
            seen = {slots[int(slot)] for slot in row.nonzero()}
            assert seen == set(range(max(0, query - window + 1), query + 1))
        start = stop


@settings(deadline=None, max_examples=40)
@given(
    n_tokens=st.integers(1, 60),
    chunk=st.integers(1, 70),
    slack=st.integers(1, 70),
    max_tokens=st.integers(1, 12),
)
def test_ring_cache_equals_full_mask_for_any_chunking(
    model: Transformer, n_tokens: int, chunk: int, slack: int, max_tokens: int
) -> None:
    ids = token_ids(n_tokens, seed=n_tokens)
    ring = Engine(model, max_seq_len=80, chunk=chunk, slack=slack)
    full = Engine(model, max_seq_len=80, chunk=80, slack=80)
    seen: list[torch.Tensor] = []
    completion = list(
        ring.generate(
            ids, lambda logits, so_far: seen.append(logits) or greedy(logits, so_far), max_tokens=max_tokens
        )
    )
    expected = full.prefill([ids + completion[:-1]])[0]
    torch.testing.assert_close(seen[-1], expected, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_an_edited_conversation_gives_what_a_fresh_engine_gives(
    model: Transformer, data: st.DataObject
) -> None:
    """Extending, rewinding and replacing the cached ids never changes the answer."""
    slack = data.draw(st.integers(1, 20))
    kept = Engine(model, max_seq_len=120, chunk=data.draw(st.integers(1, 40)), slack=slack)
    ids: list[int] = []
    for turn in range(4):
        keep = data.draw(st.integers(0, len(ids)))
        ids = ids[:keep] + token_ids(data.draw(st.integers(1, 20)), seed=turn)
        fresh = Engine(model, max_seq_len=120, chunk=120, slack=120)
        completion = list(kept.generate(ids, greedy, max_tokens=5))
        assert completion == list(fresh.generate(ids, greedy, max_tokens=5))
        ids = ids + completion


def test_a_turn_that_extends_the_cached_ids_prefills_only_what_is_new(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=100, chunk=64, slack=8)
    first = token_ids(30)
    completion = list(engine.generate(first, greedy, max_tokens=6))
    second = first + completion + token_ids(5, seed=9)
    assert engine.n_reusable(second) == 35  # nothing came after the answer's last id, so it was not run
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1].flatten().tolist()))
    list(engine.generate(second, greedy, max_tokens=1))
    hook.remove()
    assert seen == list(range(35, 41))


def test_positions_that_were_overwritten_before_a_rewind_are_not_taken_for_older_ones(
    model: Transformer,
) -> None:
    kept = Engine(model, max_seq_len=200, chunk=64, slack=8)
    ids = token_ids(100)
    for n_shared in (100, 95, 90):
        prompt = [*ids[:n_shared], 5, 6]
        fresh = Engine(model, max_seq_len=200, chunk=200, slack=200)
        torch.testing.assert_close(next_logits(kept, prompt), next_logits(fresh, prompt), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=300)
@given(
    sliding_window=st.integers(1, 8),
    slack=st.integers(1, 8),
    max_seq_len=st.integers(1, 60),
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=20),
)
def test_a_rewind_is_allowed_only_where_the_ring_still_holds_the_window(
    sliding_window: int, slack: int, max_seq_len: int, steps: list[tuple[int, int]]
) -> None:
    """Play the slots by label through writes and rewinds; an allowed rewind shows no query a wrong position."""
    config = ModelConfig(**vars(MISTRAL_7B) | {"n_layers": 1, "n_kv_heads": 1, "head_dim": 2})
    config = ModelConfig(**vars(config) | {"sliding_windows": (sliding_window,)})
    cache = KVCache(config, max_seq_len=max_seq_len, slack=slack)
    (ring,), slots, n_held = cache.rings, {}, 0
    for back, n_tokens in steps:
        start = max(0, n_held - back)
        start = start if cache.can_rewind(start) else 0
        cache.rewind(start)
        n_held = min(start + min(n_tokens, slack), max_seq_len)
        if n_held == start:
            continue
        positions = torch.arange(start, n_held)
        (piece,) = cache.begin(positions[None])
        slots |= {position % ring.capacity: position for position in range(start, n_held)}
        for query, row in zip(positions.tolist(), piece.seen[ring].mask[0], strict=True):
            seen = {slots[int(slot)] for slot in row.nonzero()}
            assert seen == set(range(max(0, query - sliding_window + 1), query + 1))


def test_a_chunk_that_was_interrupted_leaves_a_cache_that_answers_as_a_fresh_one(model: Transformer) -> None:
    kept = Engine(model, max_seq_len=200, chunk=32, slack=8)
    ids = token_ids(100)
    next_logits(kept, ids[:60])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next_logits(kept, ids[:68])
    hook.remove()
    for n_shared in (60, 55):
        prompt = [*ids[:n_shared], 5, 6]
        fresh = Engine(model, max_seq_len=200, chunk=200, slack=200)
        torch.testing.assert_close(next_logits(kept, prompt), next_logits(fresh, prompt), atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_chunk_whose_positions_are_on_the_cpu_waits_for_no_device(model: Transformer) -> None:
    cache = KVCache(model.config, max_seq_len=100, n_seqs=2, slack=8, device="cuda")
    positions = torch.arange(20).repeat(2, 1)
    positions[1, 13:] = -1
    torch.cuda.set_sync_debug_mode("error")
    try:
        pieces = cache.begin(positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(pieces) == 3
    assert cache.last.tolist() == [19, 12]


def test_a_buffer_that_cannot_grow_stays_as_it_was(model: Transformer) -> None:
    cache = KVCache(model.config, max_seq_len=1 << 50, slack=8)
    layer = cache.layers[0]
    layer.reserve(10)
    layer.values = layer.values.expand(1 << 40, -1, -1, -1)  # so that the second of the two never fits
    with pytest.raises(RuntimeError):
        layer.reserve(1000)
    assert layer.keys.shape[2] == layer.values.shape[2] == 10


def test_a_step_past_the_context_is_refused(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=10, chunk=16, slack=8, n_seqs=2)
    engine.prefill([token_ids(9), token_ids(3)])
    engine.step([5, 5])
    with pytest.raises(ContextOverflowError, match="context of 10"):
        engine.step([5, 5])


@settings(deadline=None, max_examples=100)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 1000),
)
def test_an_int8_vector_is_off_by_half_a_scale_at_most(dtype: torch.dtype, exponent: int, seed: int) -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(seed)).mul(2.0**exponent).to(dtype)
    codes, scales = quantized(x)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -127
    error = (codes * scales[..., None] - x.float()).abs()
    assert (error <= scales[..., None] * 0.5001).all()
    assert (scales * 127 <= x.float().abs().amax(-1) * 1.000001).all()


def test_an_int8_vector_of_zeros_stays_zeros_and_halves_are_rounded_to_even() -> None:
    codes, scales = quantized(torch.tensor([[0.0, 0.0, 0.0, 0.0], [127.0, 0.5, -1.5, 2.5]]))
    assert codes.tolist() == [[0, 0, 0, 0], [127, 0, -2, 2]]
    assert scales.isfinite().all() and scales[1] == 1


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_attention_over_an_int8_cache_is_off_by_what_its_rounding_explains(kernel: str) -> None:
    """Off by half a scale in each part, a key moves a score of q by `ε = |q|₁ · scale / 2 / √head_dim` at most.

    The weights then change by `exp(2ε) − 1` of their sum at most, and a value by half of its scale.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n_heads, 12, 64, generator=generator) for n_heads in (6, 2, 2))
    seen = Seen(torch.arange(20, 32).repeat(2, 1), Ring(12, 9), 12)
    exact = attention.reference(q, k, v, seen)
    (keys, key_scales), (values, value_scales) = quantized(k), quantized(v)
    attend = attention.reference if kernel == "reference" else attention.on("cpu")
    out = attend(q, keys, values, seen, key_scales, value_scales)
    epsilon = q.abs().sum(-1).amax() * key_scales.amax() / 2 / 64**0.5
    bound = (epsilon * 2).expm1() * v.abs().amax() + value_scales.amax() / 2
    error = (out - exact).abs().amax()
    assert 0 < error <= bound < 1.1
    torch.testing.assert_close(
        out, attention.reference(q, keys * key_scales[..., None], values * value_scales[..., None], seen)
    )


def test_an_int8_cache_answers_the_same_for_any_chunking_and_after_a_rewind(model: Transformer) -> None:
    ids = token_ids(60)
    once = Engine(model, max_seq_len=80, chunk=80, slack=80, cache_dtype=torch.int8)
    kept = Engine(model, max_seq_len=80, chunk=7, slack=5, cache_dtype=torch.int8)
    expected = next_logits(once, ids)
    next_logits(kept, [*ids[:57], 5, 6])
    assert kept.n_reusable(ids) == 57
    # A rounding of float32 turns a code to the next now and then: a 127th of a key's largest, in one part of 16.
    torch.testing.assert_close(next_logits(kept, ids), expected, atol=2e-2, rtol=0)
    dense = next_logits(Engine(model, max_seq_len=80, chunk=80), ids)
    assert 0 < (expected - dense).norm() / dense.norm() < 0.05


def test_a_rewind_past_the_ring_starts_over(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=100, chunk=64, slack=4)
    ids = token_ids(60)
    list(engine.generate(ids, greedy, max_tokens=1))
    assert engine.n_reusable([*ids[:58], 5, 6]) == 58
    assert engine.n_reusable([*ids[:50], 5, 6]) == 0


def test_closing_the_generator_in_the_middle_leaves_a_usable_cache(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=100, chunk=16, slack=8)
    ids = token_ids(20)
    generation = engine.generate(ids, greedy, max_tokens=10)
    begun = [next(generation) for _ in range(4)]
    generation.close()
    assert list(engine.generate(ids + begun, greedy, max_tokens=6)) == list(
        Engine(model, max_seq_len=100, chunk=100, slack=100).generate(ids + begun, greedy, max_tokens=6)
    )


def test_the_cache_of_a_window_is_seven_times_smaller_and_eight_with_slack_one() -> None:
    windowless = ModelConfig(**{**vars(MISTRAL_7B), "sliding_windows": (None,) * 32})
    full = cache_size_bytes(windowless, 32768)
    assert full == 2 * 32768 * 32 * 8 * 128 * 4
    assert full / cache_size_bytes(MISTRAL_7B, 32768) >= 7
    assert full / cache_size_bytes(MISTRAL_7B, 32768, slack=1) == 8


def test_a_windowless_7b_of_32k_positions_takes_half_the_cache_in_int8() -> None:
    windowless = ModelConfig(**{**vars(MISTRAL_7B), "sliding_windows": (None,) * 32})
    in_16_bits, in_int8 = (
        cache_size_bytes(windowless, 32768, dtype=dtype) for dtype in (torch.bfloat16, torch.int8)
    )
    assert in_int8 / in_16_bits == (128 + 4) / 256
    assert in_int8 < 2.3e9  # behind 3.9 GB of int4 weights, on a card of 6 GiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("n_tokens", [1, 50, 1023, 1500, 4000])
def test_a_cache_grows_with_its_tokens_to_the_size_that_was_planned(
    model: Transformer, n_tokens: int, dtype: torch.dtype
) -> None:
    cache = KVCache(model.config, max_seq_len=4000, slack=512, dtype=dtype)
    positions = torch.arange(n_tokens)[None]
    for start in range(0, n_tokens, 512):
        cache.begin(positions[:, start : start + 512])
    planned = cache_size_bytes(model.config, 4000, slack=512, dtype=dtype)
    slots = [layer.keys.shape[2] for layer in cache.layers]
    assert slots[0] == min(4000, -(-n_tokens // GROWTH_SLOTS) * GROWTH_SLOTS)
    assert max(slots[1:]) <= 9 + 512 - 1
    assert cache.size_bytes <= planned
    assert n_tokens < 4000 or cache.size_bytes == planned


def test_a_prompt_without_room_for_an_answer_is_refused_with_numbers(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=10, chunk=16, slack=8)
    with pytest.raises(ContextOverflowError, match=r"10 tokens.*context of 10"):
        next(engine.generate(token_ids(10), greedy))
    assert len(list(engine.generate(token_ids(9), greedy))) == 1
