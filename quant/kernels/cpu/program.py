"""Many jobs, one after the other, in a single parallel region.

To enter a parallel region with threads that sleep takes 100 µs, and a model's decode step has some hundred jobs of a
few µs each. So a program is entered once: every thread walks through its jobs and takes tasks where there are some. A
step of a program is jobs that do not need each other; the next waits until all their tasks are done. Between steps
nobody waits for a thread, only for tasks: one that comes late, or that other work has pushed off its core, holds nobody
up unless it has a task in hand. Only the end of the region waits for all.

In memory a job is a row of 32 int64: the kernel's address, how many threads are in it, whether its step waits for
those before, then from `_JOB` on what the kernel reads. A step is over when no task is left and nobody is inside.
"""

import ctypes
import functools
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from quant.kernels.cpu import pool
from quant.kernels.cpu.machine_code import Code, kernel
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job

_KERNEL, _INSIDE, _WAITS, _JOB, _ROW = 0, 1, 2, 8, 32
"""Places in a row, and its length; what is changed all the time has a cache line of its own."""

_SPINS = 2000
"""How often a thread looks before it offers its core to others: some 50 µs, more than most jobs take."""


class Program:
    """Steps of jobs for any number of rows, to be run as often as wanted. The addresses in them must stay valid.

    What depends on the number of rows, tasks or arguments, must do so linearly: the steps for none and those for one
    then tell those for any number.
    """

    def __init__(self, of_none: Sequence[Sequence[Job]], of_one: Sequence[Sequence[Job]]) -> None:
        self._of_none = _table(of_none)
        self._of_each = _table(of_one) - self._of_none
        self._rows = np.empty_like(self._of_none)
        self._walk = (
            kernel(_walking_kernel),
            self._rows.ctypes.data,
            len(self._rows),
        )

    def run(self, n_threads: int, n_rows: int = 1) -> None:
        """Run all steps for `n_rows` rows on `n_threads` threads, this one among them."""
        np.multiply(self._of_each, n_rows, out=self._rows)
        self._rows += self._of_none
        walk, *arguments = self._walk
        pool.run(Job(walk, n_threads, (*arguments, _yield_address())), n_threads)


def _table(steps: Sequence[Sequence[Job]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """A row of words for each job; the places of what changes while they run are 0."""
    jobs = [(job, at == 0) for step in steps for at, job in enumerate(step)]
    table = np.zeros((len(jobs), _ROW), dtype=np.int64)
    for row, (job, waits) in zip(table, jobs, strict=True):
        row[[_KERNEL, _WAITS, _JOB + N_TASKS]] = job.kernel, waits, job.n_tasks
        row[_JOB + ARGUMENTS : _JOB + ARGUMENTS + len(job.arguments)] = job.arguments
    return table


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


def _emit_read(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load_atomic(_pointer(builder, address), "seq_cst", 8)


def _emit_add(builder: ir.IRBuilder, address: ir.Value, by: ir.Value) -> ir.Value:
    return builder.atomic_rmw("add", _pointer(builder, address), by, "seq_cst")


def _emit_call(builder: ir.IRBuilder, function: ir.Value, argument: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [argument])


def _emit_pause(builder: ir.IRBuilder) -> None:
    """Tell the core that this is a loop that waits."""
    if platform.machine() in ("x86_64", "AMD64"):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=kind), [])
    elif platform.machine() in ("aarch64", "arm64"):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        builder.call(builder.module.declare_intrinsic("llvm.aarch64.hint", fnty=kind), [ir.IntType(32)(1)])


@functools.cache
def _yield_address() -> int:
    """Of the C function that offers the core to others; 0 where there is none, and threads spin."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):  # Windows
        return 0


def _walking_kernel() -> Code:
    """Its tasks are the threads: each walks through all rows."""
    from numba import types

    from quant.kernels.cpu.inline import inlined

    read, add = (inlined(emit, 0, types.int64) for emit in (_emit_read, _emit_add))
    call, pause = inlined(_emit_call, 0), inlined(_emit_pause, 0)
    row_bytes, job, inside, waits = 8 * _ROW, 8 * _JOB, 8 * _INSIDE, 8 * _WAITS

    def walk(program: Any) -> None:
        rows, n_jobs, give_way = program[ARGUMENTS], program[ARGUMENTS + 1], program[ARGUMENTS + 2]
        done = 0
        for at in range(n_jobs):
            row = rows + at * row_bytes
            while done < at and read(row + waits):
                before, spins = rows + done * row_bytes, 0
                while read(before + job) < read(before + job + 8) or read(before + inside):
                    spins += 1
                    if spins < _SPINS or not give_way:
                        pause()
                    else:
                        call(give_way, 0)
                done += 1
            if read(row + job) < read(row + job + 8):
                add(row + inside, 1)
                call(read(row), row + job)
                add(row + inside, -1)

    return walk
