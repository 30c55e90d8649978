"""The draw of a token by temperature alone, as `mistralcli.sampling` does it in NumPy, in one call.

Weights are exp of what a logit is below the largest, over the temperature. They are summed block by block, the block is
found in which the running sum passes the target, and that block is weighed again: only sums are kept in memory.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir

from mistralcli.kernels.cpu.floats import LOWEST, exp, total
from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.machine_code import Code, kernel
from quant.kernels.cpu.pool import ARGUMENTS
from quant.kernels.cpu.vectors import F32, I64, Vectors

BLOCK = 256
"""Logits of a block, a multiple of any vector's lanes."""

F64 = ir.DoubleType()


def emit_weigh(
    builder: ir.IRBuilder,
    width: int,
    logits: ir.Value,
    scaling: ir.Value,
    weights: ir.Value,
    sum_of_all: ir.Value,
) -> None:
    """Write the weights of a block of logits, all addresses of float32, and their sum, as float64.

    scaling: the address of two: the largest logit, and the inverse of the temperature.
    """
    v = Vectors(builder, width)
    highest, inverse = (v.splat(v.load(F32, scaling, offset)) for offset in (0, 4))
    low, none = v.constant(v.floats, LOWEST), v.constant(v.floats, 0.0)

    def weigh(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, to, sums = carried
        below = builder.fmul(builder.fsub(v.load(v.floats, at), highest), inverse)
        weight = builder.select(builder.fcmp_ordered("<", below, low), none, exp(v, below))
        v.store(weight, to)
        return [v.offset(at, 4 * width), v.offset(to, 4 * width), builder.fadd(sums, weight)]

    _, _, sums = v.loop(I64(BLOCK // width), [logits, weights, none], weigh)
    v.store(builder.fpext(total(v, sums), F64), sum_of_all)


def _reading(kind: ir.Type) -> Callable[[ir.IRBuilder, ir.Value], ir.Value]:
    def emit(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return builder.load(builder.inttoptr(address, kind.as_pointer()))

    return emit


def emit_copy(builder: ir.IRBuilder, source: ir.Value, to: ir.Value) -> None:
    """One float32."""
    v = Vectors(builder, 1)
    v.store(v.load(F32, source), to)


def _drawing_kernel(width: int) -> Code:
    """Its only task. The id takes the place of its first argument."""
    from numba import types

    from quant.kernels.cpu.inline import inlined

    weigh, copy = inlined(emit_weigh, 1), inlined(emit_copy, 0)
    read_float = inlined(_reading(F32), 0, types.float32)
    read_double = inlined(_reading(F64), 0, types.float64)

    def draw(job: Any) -> None:
        logits, n_logits, scaling, uniform, weights, last, sums = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
        )
        n_whole, n_blocks = n_logits // BLOCK, -(-n_logits // BLOCK)
        for i in range(n_logits - n_whole * BLOCK):  # to the last block, which is −∞ behind them
            copy(logits + 4 * (n_whole * BLOCK + i), last + 4 * i)
        whole = 0.0
        for block in range(n_blocks):
            at = logits + 4 * BLOCK * block if block < n_whole else last
            weigh(width, at, scaling, weights, sums + 8 * block)
            whole += read_double(sums + 8 * block)
        target, passed, before, chosen_block, at_block = read_double(uniform) * whole, 0.0, 0.0, 0, 0
        for block in range(n_blocks):
            of_block = read_double(sums + 8 * block)
            if of_block > 0.0:
                chosen_block, before = block, passed
                if passed + of_block > target:
                    break
            passed += of_block
        at = logits + 4 * BLOCK * chosen_block if chosen_block < n_whole else last
        weigh(width, at, scaling, weights, sums)
        for i in range(BLOCK):
            weight = read_float(weights + 4 * i)
            if weight > 0.0:  # the last such one, where rounding leaves the target unreached
                at_block = i
                before += weight
                if before > target:
                    break
        job[ARGUMENTS] = chosen_block * BLOCK + at_block

    return draw


class Draw:
    """Draws from rows of n_logits logits, in memory that is there once."""

    def __init__(self, n_logits: int) -> None:
        self.n_logits = n_logits
        self._scaling = (ctypes.c_float * 2)()
        self._uniform = ctypes.c_double()
        self._blocks = (ctypes.c_float * BLOCK)(), (ctypes.c_float * BLOCK)(*[-math.inf] * BLOCK)
        self._sums = (ctypes.c_double * (-(-n_logits // BLOCK)))()
        places = map(ctypes.addressof, (self._scaling, self._uniform, *self._blocks, self._sums))
        self._job = (ctypes.c_int64 * (ARGUMENTS + 7))(0, 1, 0, n_logits, *places)
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel(_drawing_kernel, chosen().lanes))

    def __call__(self, logits: torch.Tensor, highest: float, inverse: float, uniform: float) -> int:
        """The id where the running sum of the weights passes `uniform` (0 ≤ uniform < 1) of their total.

        logits: (n_logits,) float32, contiguous, none above `highest`; inverse: of the temperature.
        """
        self._scaling[0], self._scaling[1], self._uniform.value = highest, inverse, uniform
        self._job[ARGUMENTS] = logits.data_ptr()
        self._call(self._job)
        return self._job[ARGUMENTS]
