"""How the rows of a weight are shared out: long runs of them first, shorter ones towards the end.

A thread that streams along memory gets more of it the longer it goes on: where two cores of an EPYC have no cache in
common, runs of 135 KB got three quarters of what they can read, runs of 2 MB and more nine tenths (`docs/log.md`). At
the end runs are short, so that no thread waits long for another, even for one that other work has held up
(Polychronopoulos and Kuck 1987, "Guided self-scheduling").
"""

import ctypes
import functools


@functools.cache
def starts_of_shares(n: int, least: int, n_threads: int) -> "ctypes.Array[ctypes.c_int64]":
    """Where each task's share of n begins, and last of all n: one more than there are tasks.

    Kernels read it at its address, so it is kept.
    """
    starts = [0]
    while starts[-1] < n:
        starts.append(min(n, starts[-1] + max(least, (n - starts[-1]) // (2 * n_threads))))
    return (ctypes.c_int64 * len(starts))(*starts)
