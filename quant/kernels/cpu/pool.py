"""Kernels on several threads: those of torch, so that a process has one pool.

A second pool would be a second set of threads that wait by spinning: two of them on two cores halve each other's
speed. So a kernel runs in a parallel region of the very OpenMP library that torch computes with, and its threads find
themselves there between two operators of torch.

A kernel is a C function of one argument, its job: an array of int64, addresses and sizes, whose first two entries are
the number of the next task and the number of tasks. Whichever thread is free takes the next: a core that other work
keeps busy holds nobody up.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NEXT_TASK, N_TASKS, ARGUMENTS = 0, 1, 2
"""Places in a job."""


@dataclass(frozen=True)
class Job:
    """A kernel with what it reads and writes; the memory at its addresses is whoever made it's to keep."""

    kernel: int
    n_tasks: int
    arguments: Sequence[int]


def run(job: Job, n_threads: int) -> None:
    """Run a job's tasks on up to `n_threads` threads, this one among them; returns when all are done."""
    words = (ctypes.c_int64 * (ARGUMENTS + len(job.arguments)))(0, job.n_tasks, *job.arguments)
    n_threads = min(n_threads, job.n_tasks)
    if n_threads > 1:
        _parallel()(job.kernel, words, n_threads)
    elif job.n_tasks:
        _C_KERNEL(job.kernel)(words)


_C_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _parallel() -> Callable[[int, Any, int], None]:
    """Calls a kernel at an address with a job in so many threads at a time.

    OpenMP's entry is `GOMP_parallel`, in GCC's library and, for compatibility, in LLVM's and Intel's. A symbol is
    looked for in a library and in those that it was linked with, so it is found in torch's own.
    """
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.[sd][oy]*"))
    try:
        openmp = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (IndexError, OSError, AttributeError):
        return _by_python_threads
    openmp.argtypes, openmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return lambda address, job, n_threads: openmp(address, job, n_threads, 0)


def _by_python_threads(address: int, job: Any, n_threads: int) -> None:
    """The same where torch has no OpenMP; a C function called from Python runs without the interpreter's lock."""
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(n_threads):
            pool.submit(_C_KERNEL(address), job)
