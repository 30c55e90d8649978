"""The CPU's kernels beside the matmuls, each against its reference, and the decode step that is made of them."""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, random_checkpoint, token_ids
from test_cpu_matmul import run_capped

from mistralcli import cpu_decoder
from mistralcli.cache import Ring, Seen, quantized, write_ring
from mistralcli.engine import Engine
from mistralcli.kernels import sdpa
from mistralcli.kernels.cpu import pointwise
from mistralcli.kernels.cpu.attention import Scratch, takes
from mistralcli.kernels.cpu.attention import attention as few
from mistralcli.kernels.cpu.dense import product_job, tied_logits
from mistralcli.ops import apply_rotary, attention, rms_norm, rotary_tables, swiglu
from mistralcli.plan import choose_cache_dtype
from mistralcli.weights import load_kernels, open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.errors import UsageError
from quant.kernels.cpu import isa, pool
from quant.kernels.cpu.program import Program
from quant.schemes.affine import Affine

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
TOLERANCE = 3e-5
"""Of sums in float32 whose terms are below about 20."""

ASKED = [
    # queries of a sequence, position of the first, window, key heads, query heads
    (1, 0, None, 1, 1),
    (1, 36, None, 2, 6),
    (5, 28, 9, 1, 5),
    (1, 500, 31, 2, 4),
    (3, 700, 290, 3, 3),
    (8, 290, None, 2, 4),
]
"""One query and several; a ring that is not full, full, wrapped; multi-head, grouped and multi-query."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def ring_of(dtype: torch.dtype, *shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A buffer in which more slots are allocated than are in use, and its scales."""
    x = randn(*shape, seed=seed)
    return quantized(x) if dtype == torch.int8 else (x.to(dtype), None)


def check_attention(dtype: torch.dtype, head_dim: int) -> None:
    """Two sequences, the second of which has padding from its middle on."""
    for n_tokens, start, window, n_kv_heads, n_heads in ASKED:
        ring = Ring.of(window, max_seq_len=800, slack=n_tokens)
        positions = torch.arange(start, start + n_tokens).repeat(2, 1)
        positions[1, n_tokens // 2 :] = -1
        seen = Seen(positions, ring, min(start + n_tokens, ring.capacity))
        (k, k_scales), (v, v_scales) = (
            ring_of(dtype, 2, n_kv_heads, seen.n_slots + 3, head_dim, seed=seed) for seed in (1, 2)
        )
        q, used = randn(2, n_heads, n_tokens, head_dim), (slice(None), slice(None), slice(seen.n_slots))
        scales = [None if one is None else one[used] for one in (k_scales, v_scales)]
        assert takes(k[used], v[used], *scales)
        out = few(q, k[used], v[used], seen, *scales)
        expected = attention.reference(q, k[used], v[used], seen, *scales)
        torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert torch.equal(out[1, :, n_tokens // 2 :], torch.zeros_like(out[1, :, n_tokens // 2 :]))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_attention_of_few_queries_is_its_reference_for_every_type_of_cache(dtype: torch.dtype) -> None:
    check_attention(dtype, 24)


def test_attention_does_not_depend_on_how_many_threads_share_the_keys_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mistralcli.kernels.cpu.attention.WORTH_A_THREAD", 0)
    seen = Seen(torch.tensor([[899]]), Ring(1000, 800), 900)
    q, k, v = randn(1, 4, 1, 24), randn(1, 2, 900, 24, seed=1), randn(1, 2, 900, 24, seed=2)
    expected, before, found = attention.reference(q, k, v, seen), torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append(few(q, k, v, seen))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert all(torch.equal(one, found[0]) for one in found)


def test_decoding_reads_the_ring_as_it_lies_and_many_queries_go_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    module = sdpa._of_few()
    assert module is not None
    monkeypatch.setattr(module, "attention", lambda q, *rest: asked.append(q.shape[2]) or few(q, *rest))
    k = v = randn(1, 1, 20, 24).half()
    for n_tokens in (1, sdpa.FEW_QUERIES, sdpa.FEW_QUERIES + 1):
        seen = Seen(torch.arange(20 - n_tokens, 20)[None], Ring(20, None), 20)
        q = randn(1, 2, n_tokens, 24)
        expected = attention.reference(q, k, v, seen)
        torch.testing.assert_close(attention(q, k, v, seen), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert asked == [1, sdpa.FEW_QUERIES]
    every_other = randn(1, 1, 40, 24)[:, :, ::2]
    assert not takes(every_other, every_other) and not takes(k.double(), v.double())


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_the_ring_holds_exactly_what_the_reference_writes(dtype: torch.dtype) -> None:
    positions = torch.tensor([[16, 17, 18, 19, 20, 21, 22], [3, 4, -1, -1, -1, -1, -1]])
    seen, x = Seen(positions, Ring(20, 9), 20), randn(2, 7, 3, 24)
    x[0, 1, 0], x[0, 2, 1, 3] = 0.0, 1e-9
    written = []
    for write in (write_ring.reference, pointwise.write_ring):
        buffer = torch.zeros(2, 3, 20, 24).to(dtype)
        scales = torch.zeros(2, 3, 20) if dtype == torch.int8 else None
        assert write(buffer, x, seen, scales) is buffer
        written.append((buffer, scales))
    (theirs, their_scales), (ours, our_scales) = written
    assert torch.equal(ours, theirs)
    if their_scales is not None and our_scales is not None:
        assert torch.equal(our_scales, their_scales)


def test_padding_alone_sees_nothing_and_writes_only_its_own_rows() -> None:
    """As the end of a chunk is, in pieces: no slot holds what is seen, and there is a segment all the same."""
    seen = Seen(torch.full((1, 3), -1), Ring(8, 6), 0)
    out = few(randn(1, 4, 3, 32), torch.empty(1, 2, 0, 32), torch.empty(1, 2, 0, 32), seen)
    assert torch.equal(out, torch.zeros(1, 4, 3, 32))
    scratch = Scratch(3, 4, 32, 0)
    assert len(scratch.sums) == 3 * 4 * 32 and len(scratch.state) == 3 * 4 * 2


def test_what_is_not_finite_is_written_as_the_reference_does() -> None:
    bad = (
        torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, 70000.0, -0.0])
        .repeat(4)
        .view(1, 1, 1, 24)
    )
    seen = Seen(torch.tensor([[0]]), Ring(1, None), 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, theirs = (
            write(torch.zeros(1, 1, 1, 24, dtype=dtype), bad, seen)
            for write in (pointwise.write_ring, write_ring.reference)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=0, rtol=0)
    scales = torch.zeros(1, 1, 1)
    pointwise.write_ring(torch.zeros(1, 1, 1, 24, dtype=torch.int8), bad, seen, scales)
    assert not scales.isfinite().any()


def check_pointwise() -> None:
    for dim, dtype in product((48, 40, 7), (torch.float32, torch.bfloat16)):
        x, weight = randn(2, 3, dim).to(dtype), randn(dim, seed=1).to(dtype)
        tolerance = 4e-6 if dtype == torch.float32 else 2e-2
        for ours, theirs in (
            (pointwise.rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5)),
            (pointwise.swiglu(30 * x, x), swiglu.reference(30 * x, x)),
        ):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    extremes = torch.tensor([[-1e30, -200.0, -87.0, 0.0, 87.0, 200.0, 1e30]])
    ours, theirs = (one(extremes, torch.ones(1, 7)) for one in (pointwise.swiglu, swiglu.reference))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    heads = randn(2, 3, 4, 24)
    tables = rotary_tables(torch.arange(6).view(2, 3) * 1000, 24, 1e4)
    ours, theirs = (one(heads, *tables) for one in (pointwise.apply_rotary, apply_rotary.reference))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_norm_swiglu_and_rotary_are_their_references_for_odd_lengths_and_extremes() -> None:
    check_pointwise()


def check_products() -> None:
    for dtype, dim in product((torch.float32, torch.bfloat16), (48, 20)):
        weight = randn(37, dim, seed=3).to(dtype)
        for n_rows in (1, 3, 8, 15, 30):
            x = randn(n_rows, dim)
            expected = x.double() @ weight.double().T
            torch.testing.assert_close(tied_logits(x, weight).double(), expected, atol=2e-4, rtol=1e-5)
        several, alone = torch.zeros(15, 37), torch.zeros(15, 37)
        x = randn(15, dim)
        pool.run(product_job(weight, x.data_ptr(), (several.data_ptr(), 4 * 37), 15, 2), 1)
        for row, y in zip(x, alone, strict=True):
            pool.run(product_job(weight, row.data_ptr(), (y.data_ptr(), 4 * 37), 1, 2), 1)
        assert torch.equal(several, alone), (dtype, dim)


def test_products_with_a_dense_weight_are_exact_but_for_sums_in_float32() -> None:
    check_products()


@pytest.mark.parametrize("name", [one.name for one in isa.available() if one.name in ("avx2", "plain")])
def test_kernels_are_their_references_with_narrower_vectors(name: str) -> None:
    """AVX-VNNI has the vectors of AVX2, and is different in its products of bytes alone."""
    code = (
        "from test_cpu_ops import *\n"
        f"assert isa.chosen().name == {name!r}\n"
        "check_attention(torch.bfloat16, 24), check_pointwise(), check_products()\n"
    )
    done = run_capped(name, code)
    assert done.returncode == 0, done.stderr


def test_a_program_waits_for_every_step_before_the_next() -> None:
    """Rows that are added and normalized in turn, by more threads than there are cores: an early start would show."""
    n_tokens, dim, n_steps = 64, 48, 60
    weight, eps = randn(dim, seed=1), torch.tensor([1e-5])

    def outcome(n_threads: int) -> torch.Tensor:
        a, b = randn(n_tokens, dim, seed=2), randn(n_tokens, dim, seed=3)
        mixed = torch.zeros(n_tokens, dim)
        steps = []
        for step in range(n_steps):
            h, other = (a, b) if step % 2 else (b, a)
            # Rows of the other are read in reverse, so that they come from other threads.
            last = other.data_ptr() + (n_tokens - 1) * dim * 4
            steps.append(
                [pointwise.norm_job(h.data_ptr(), (last, -4 * dim), weight, eps, mixed.data_ptr(), n_tokens)]
            )
        program = Program(steps, steps)
        program.run(n_threads)
        return mixed

    expected = outcome(1)
    assert expected.isfinite().all()
    for n_threads in (2, 3, 7) * 5:
        assert torch.equal(outcome(n_threads), expected)


def test_threads_that_share_a_dense_weight_out_leave_no_row_out() -> None:
    weight, x = randn(10_003, 48), randn(3, 48, seed=1)
    for n_threads in (1, 2, 3, 7):
        out = torch.zeros(3, 10_003)
        job = product_job(weight, x.data_ptr(), (out.data_ptr(), 4 * 10_003), 3, n_threads)
        assert job.n_tasks > n_threads
        pool.run(job, n_threads)
        torch.testing.assert_close(out, x @ weight.T, atol=2e-4, rtol=1e-5)


def test_a_program_is_for_any_number_of_rows() -> None:
    x, weight, out = randn(9, 48), randn(33, 48, seed=1), torch.zeros(9, 33)
    jobs = [[[product_job(weight, x.data_ptr(), (out.data_ptr(), 4 * 33), n, 2)]] for n in (0, 1)]
    program = Program(*jobs)
    for n_rows in (9, 2, 5):
        out.zero_()
        program.run(2, n_rows)
        torch.testing.assert_close(out[:n_rows], x[:n_rows] @ weight.T, atol=2e-4, rtol=1e-5)
        assert not out[n_rows:].any()


def test_jobs_of_one_step_run_whatever_their_order() -> None:
    x, weight = randn(1, 48), randn(33, 48, seed=1)
    outs = [torch.zeros(1, 33) for _ in range(5)]
    jobs = [product_job(weight, x.data_ptr(), (out.data_ptr(), 4 * 33), 1, 3) for out in outs]
    Program([jobs], [jobs]).run(3)
    pool.run(jobs[0], 1)
    for out in outs:
        torch.testing.assert_close(out, x @ weight.T, atol=2e-4, rtol=1e-5)


def engines(directory: Path, n_seqs: int, cache_dtype: torch.dtype, **settings: Any) -> list[Engine]:
    """One that decodes by the program, and one by the model's forward pass."""
    model = load(directory)
    made = [Engine(model, n_seqs=n_seqs, cache_dtype=cache_dtype, **settings) for _ in range(2)]
    assert made[0]._cpu_decoder is not None
    made[1]._cpu_decoder = None
    return made


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_key_value_heads": 1, "head_dim": 24, "sliding_window": 9}, {"tie_word_embeddings": True}],
)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_the_decode_step_is_the_models_forward_pass(
    shape: dict[str, Any], cache_dtype: torch.dtype, tmp_path: Path
) -> None:
    """A batch of prompts of any lengths, through buffers that grow, rings that wrap and another number of threads.

    In an int8 cache a key or value at the edge between two codes may be either: 1/127 of the largest of its vector,
    which moved the logits by 0.008 at most.
    """
    random_checkpoint(tmp_path, dtype="bfloat16", **shape)
    ours, theirs = engines(tmp_path, 3, cache_dtype, max_seq_len=64, chunk=16, slack=8)
    prompts = [token_ids(n, seed=n) for n in (1, 23, 9)]
    steps = [token_ids(3, seed=50 + i) for i in range(30)]
    torch.testing.assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    before = torch.get_num_threads()
    try:
        for i, ids in enumerate(steps):
            torch.set_num_threads(1 + i % 3)
            for layer in ours.cache.layers:
                if i == 20:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
                    layer.n_moves += 1
            tolerance = 2e-2 if cache_dtype == torch.int8 else 1e-4
            torch.testing.assert_close(ours.step(ids), theirs.step(ids), atol=tolerance, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def quantized_engine(directory: Path, n_seqs: int, bits: int, **changes: Any) -> Engine:
    """Of a random model whose linears have so many bits and whose head has 8: whole prompts go through the program."""
    random_checkpoint(directory / "dense", hidden_size=64, intermediate_size=96, **changes)
    dense = open_checkpoint(directory / "dense")
    quantize_checkpoint(
        dense, directory / "dense", directory / "build", Affine(bits, 32), head_scheme=Affine(8)
    )
    model = load(directory / "build")
    load_kernels(model)
    return Engine(model, n_seqs=n_seqs, max_seq_len=600, chunk=16, slack=24, cache_dtype=torch.float32)


PROMPTS = [token_ids(n, seed=n) for n in (1, 150, 9, 40, 2)]


@pytest.mark.parametrize("window", [None, 31])
def test_prompts_side_by_side_are_the_models_forward_pass(window: int | None, tmp_path: Path) -> None:
    """More tokens than a call has rows, and of a windowed sequence more than the slack.

    Weights of 8 bits, since they meet activations of 16: a rounding that goes the other way moves logits by 1e-4.
    """
    engine = quantized_engine(tmp_path, 5, 8, sliding_window=window)
    assert sum(map(len, PROMPTS)) > cpu_decoder.MOST_ROWS
    together = engine.start(dict(enumerate(PROMPTS)))
    steps = [engine.step([7, 8, 9, 10, 11], idle=[2]).clone() for _ in range(3)]
    engine._cpu_decoder = None
    expected = engine.start(dict(enumerate(PROMPTS)))
    for i in range(len(PROMPTS)):
        torch.testing.assert_close(together[i], expected[i], atol=1e-3, rtol=0)
    for step in steps:
        expected_step = engine.step([7, 8, 9, 10, 11], idle=[2])
        torch.testing.assert_close(step[[0, 1, 3, 4]], expected_step[[0, 1, 3, 4]], atol=1e-3, rtol=0)


@pytest.mark.parametrize("window", [None, 31])
def test_a_sequence_is_the_same_to_the_last_bit_whatever_is_beside_it(
    window: int | None, tmp_path: Path
) -> None:
    """Alone, one prompt after the other, or all at once; with any number of threads, past a segment of attention."""
    engine, alone = (
        quantized_engine(tmp_path / name, n, 4, sliding_window=window) for name, n in (("5", 5), ("1", 1))
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = engine.start(dict(enumerate(PROMPTS)))
        steps = [engine.step([20 + i] * 5).clone() for i in range(20)]
        for index, prompt in enumerate(PROMPTS):
            torch.set_num_threads(1 + index % 3)
            assert torch.equal(alone.start({0: prompt})[0], together[index])
            for i, step in enumerate(steps):
                assert torch.equal(alone.step([20 + i])[0], step[index])
            first = list(alone.generate(prompt, lambda logits, _: int(logits.argmax()), max_tokens=1))
            assert first == [int(together[index].argmax())]
    finally:
        torch.set_num_threads(before)


def test_a_long_prompt_is_left_to_the_forward_pass(tmp_path: Path) -> None:
    engine = quantized_engine(tmp_path, 2, 4)
    decoder = engine._cpu_decoder
    assert decoder is not None
    assert decoder.takes(cpu_decoder.SHORT, cpu_decoder.SHORT) and decoder.takes(1, 600)
    assert not decoder.takes(2, cpu_decoder.SHORT + 1)
    both = engine.start({0: token_ids(550), 1: token_ids(5)})
    assert set(both) == {0, 1} and all(row.isfinite().all() for row in both.values())
    assert torch.equal(engine.start({1: token_ids(5)})[1], both[1])


def test_a_model_that_the_kernels_do_not_know_is_decoded_by_its_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path)
    many = Engine(load(tmp_path), max_seq_len=8, chunk=8, n_seqs=cpu_decoder.MOST_SEQUENCES + 1)
    assert many._cpu_decoder is None
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")
    assert Engine(load(tmp_path), max_seq_len=8, chunk=8)._cpu_decoder is None


def test_the_cpu_stores_keys_and_values_in_16_bits_unless_it_is_told_or_must_be_exact() -> None:
    assert choose_cache_dtype(None, torch.float32, "cpu") == torch.float16
    assert choose_cache_dtype(None, torch.float32, "cpu", exact=True) == torch.float32
    assert choose_cache_dtype(None, torch.bfloat16, "cpu") == torch.bfloat16
    assert choose_cache_dtype("float32", torch.float32, "cpu") == torch.float32
    assert choose_cache_dtype("bf16", torch.float32, "cpu") == torch.bfloat16
    assert choose_cache_dtype(None, torch.bfloat16, "cuda") == torch.bfloat16
    with pytest.raises(UsageError, match=r"--kv float32 .* on cuda"):
        choose_cache_dtype("float32", torch.bfloat16, "cuda")


def test_pytorch_is_enough_where_there_is_no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mistralcli.kernels.cpu.attention")  # what imported it once left there
    monkeypatch.setitem(sys.modules, "mistralcli.kernels.cpu.attention", None)
    sdpa._of_few.cache_clear()
    try:
        k = v = randn(1, 1, 20, 24).bfloat16()
        seen, q = Seen(torch.tensor([[19]]), Ring(20, None), 20), randn(1, 2, 1, 24)
        assert sdpa._of_few() is None
        torch.testing.assert_close(
            sdpa.attention(q, k, v, seen), attention.reference(q, k, v, seen), atol=TOLERANCE, rtol=TOLERANCE
        )
    finally:
        sdpa._of_few.cache_clear()
