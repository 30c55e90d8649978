"""Sampling keeps what its parameters say, and a seed repeats it."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistralcli.errors import IntegrityError, UsageError
from mistralcli.kernels.cpu.sample import Draw
from mistralcli.run_options import SamplingParams
from mistralcli.sampling import Sampler, drawn, penalize, truncate, weighed
from mistralcli.session import StopScanner

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]))


def kept(**params: float) -> list[int]:
    weights = (LOGITS - LOGITS.max()).exp().numpy()
    return truncate(weights, SamplingParams(temperature=1, **params)).nonzero()[0].tolist()  # type: ignore[arg-type]


def test_truncations_keep_the_likeliest_tokens() -> None:
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.5) == [1, 2]
    assert kept(top_p=0.001) == [1]
    assert kept(min_p=0.3) == [1, 2, 3]
    assert kept(top_k=3, min_p=0.6) == [1, 2]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampler(SamplingParams(temperature=0))(LOGITS, []) == 1


def test_a_seed_repeats_the_tokens_and_another_seed_does_not() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.5, seed=seed))
        return [sampler(LOGITS, []) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_without_a_seed_one_is_chosen_that_repeats_the_tokens() -> None:
    free = Sampler(SamplingParams(temperature=1.5))
    again = Sampler(SamplingParams(temperature=1.5, seed=free.seed))
    assert [free(LOGITS, []) for _ in range(50)] == [again(LOGITS, []) for _ in range(50)]


def test_samples_follow_the_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler(LOGITS, []) for _ in range(20_000)]), minlength=5) / 20_000
    # Three standard deviations of a share of 0.4 in 20,000 draws.
    torch.testing.assert_close(counts, LOGITS.exp(), atol=3 * math.sqrt(0.4 * 0.6 / 20_000), rtol=0)


@pytest.mark.parametrize("n_logits", [1, 5, 255, 256, 257, 5000])
def test_the_kernel_draws_what_numpy_draws(n_logits: int) -> None:
    """And at neither end of the uniform numbers what is left out."""
    logits = torch.randn(n_logits, generator=torch.Generator().manual_seed(n_logits)) * 3
    logits[1::3] = -math.inf
    highest, draw, source = float(logits.max()), Draw(n_logits), random.Random(1)
    for temperature in (0.1, 0.7, 5.0):
        weights = weighed(logits.numpy(), highest, 1 / temperature)
        for uniform in (source.random() for _ in range(300)):
            assert draw(logits, highest, 1 / temperature, uniform) == drawn(weights, uniform)
        for uniform in (0.0, 1 - 2.0**-53):
            assert logits[draw(logits, highest, 1 / temperature, uniform)] > -math.inf
            assert logits[drawn(weights, uniform)] > -math.inf


@pytest.mark.parametrize("params", [{}, {"top_p": 1 - 1e-9}])
def test_draws_follow_the_distribution_across_blocks(params: dict[str, float]) -> None:
    """By the kernel and, where something may be left out, by NumPy: the mass of every 100 of 1,000 tokens."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0, **params))  # type: ignore[arg-type]
    ids = torch.tensor([sampler(logits, []) for _ in range(20_000)])
    shares = torch.bincount(ids // 100, minlength=10) / len(ids)
    expected = logits.double().softmax(0).view(10, 100).sum(1).float()
    # Four standard deviations of a share of 0.1 in 20,000 draws.
    torch.testing.assert_close(shares, expected, atol=4 * math.sqrt(0.1 * 0.9 / 20_000), rtol=0)


@given(
    weights=st.lists(st.integers(0, 40), min_size=1, max_size=600).filter(any),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_truncation_is_what_sorting_all_gives(
    weights: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    """Whole numbers with many ties, over blocks, whose sums are exact; what weighs as much as what stays, stays."""
    scaled = np.array(weights, dtype=np.float32) / np.float32(64)
    kept = sorted(weights, reverse=True)
    if 0 < top_k < len(kept):
        kept = [one for one in weights if one >= kept[top_k - 1]]
    if top_p < 1:
        ordered = sorted(kept, reverse=True)
        before = itertools.accumulate(ordered, initial=0)
        nucleus = [one for one, mass in zip(ordered, before, strict=False) if mass < top_p * sum(ordered)]
        kept = [one for one in kept if one >= nucleus[-1]]
    least = min(kept) / 64
    expected = np.where((scaled >= least) & (scaled >= np.float32(min_p)), scaled, 0)
    params = SamplingParams(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    assert np.array_equal(truncate(scaled, params), expected)


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalize(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]


def test_logits_that_are_no_numbers_are_an_error_not_a_token() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(IntegrityError):
            Sampler(SamplingParams())(torch.tensor([0.0, bad]), [])
    with pytest.raises(IntegrityError):
        Sampler(SamplingParams())(torch.tensor([-math.inf, -math.inf]), [])


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e40, 1e308])
@pytest.mark.parametrize("repeat_penalty", [0.01, 1.0, 100.0])
def test_extreme_parameters_still_choose_a_token(temperature: float, repeat_penalty: float) -> None:
    params = SamplingParams(
        temperature=temperature, repeat_penalty=repeat_penalty, top_k=3, top_p=0.9, min_p=0.1, seed=0
    )
    logits = torch.tensor([3e38, 0.0, -math.inf, -3e38, 2.0])
    assert 0 <= Sampler(params)(logits, [0, 1, 3]) < 5


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repeat_penalty": 0},
        {"repeat_penalty": 1e-300},
        {"repeat_penalty": 1e300},
        {"seed": -1},
    ],
)
def test_a_value_out_of_range_is_named(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(UsageError, match=name):
        SamplingParams(**bad)  # type: ignore[arg-type]


@given(
    text=st.text(alphabet="abc", max_size=30),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_a_stop_text_is_found_however_the_text_is_cut_into_pieces(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    scanner = StopScanner(stop)
    out = "".join(scanner.push(text[a:b]) for a, b in itertools.pairwise(edges)) + scanner.flush()
    # The stream ends at the stop text that is complete first; of several at once, at the earliest beginning.
    ends = [text.find(one) + len(one) for one in stop if one in text]
    found = [text.find(one) for one in stop if one in text]
    if not found:
        assert out == text and not scanner.stopped
    else:
        assert scanner.stopped and out == text[: len(out)]
        assert min(found) <= len(out) <= max(found) and min(ends) >= len(out)
        assert not any(one in out for one in stop)
