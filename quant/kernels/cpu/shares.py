"""How the rows of a weight are shared out: long runs of them first, shorter ones towards the end.

A thread that streams along memory gets more of it the longer it goes on: where two cores of an EPYC have no cache in
common, runs of 135 KB got three quarters of what they can read, runs of 2 MB and more nine tenths (`docs/log.md`). At
the end runs are short, so that no thread waits long for another, even for one that other work has held up
(Polychronopoulos and Kuck 1987, "Guided self-scheduling").
"""


def share(task: int, n: int, least: int, n_threads: int) -> tuple[int, int]:
    """The first of n that belongs to a task, and the one behind its last. Compiled into kernels."""
    start, stop = 0, 0
    for _ in range(task + 1):
        start = stop
        stop = min(n, start + max(least, (n - start) // (2 * n_threads)))
    return start, stop


def n_shares(n: int, least: int, n_threads: int) -> int:
    """How many tasks there are."""
    stop, count = 0, 0
    while stop < n:
        stop = min(n, stop + max(least, (n - stop) // (2 * n_threads)))
        count += 1
    return count
