"""Shares of a weight's rows: every row belongs to one task, and tasks get no longer."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from quant.kernels.cpu.shares import starts_of_shares


@given(n=st.integers(1, 3_000), least=st.integers(1, 8), n_threads=st.integers(1, 64))
def test_every_row_belongs_to_one_task_and_tasks_get_no_longer(n: int, least: int, n_threads: int) -> None:
    shares = list(pairwise(starts_of_shares(n, least, n_threads)))
    assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
    assert shares[-1][1] == n
    sizes = [stop - start for start, stop in shares]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 1
    assert all(size >= least for size in sizes[:-1])


def test_a_thread_gets_a_long_run_first_and_short_ones_at_the_end() -> None:
    shares = list(pairwise(starts_of_shares(256, 4, 2)))
    assert shares[:2] == [(0, 64), (64, 112)]
    assert shares[-1][1] - shares[-1][0] <= 4
