"""Sampling keeps what its parameters say, and a seed repeats it."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistralcli.errors import IntegrityError, UsageError
from mistralcli.sampling import Sampler, SamplingParams, penalize, truncate
from mistralcli.session import StopScanner

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]))


def kept(**params: float) -> list[int]:
    return truncate(LOGITS, SamplingParams(temperature=1, **params)).isfinite().nonzero().flatten().tolist()  # type: ignore[arg-type]


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
