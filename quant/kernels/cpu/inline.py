"""LLVM's instructions amid code that numba compiles. Imported by what builds a kernel, when it does."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def inlined(emit: Callable[..., ir.Value | None], n_constants: int, result: types.Type = types.void) -> Any:
    """What `emit(builder, *constants, *values)` emits, as a function for code that numba compiles.

    It takes the same arguments less the builder and returns what `emit` does, of the type `result`. The first
    `n_constants` must be known when it is compiled; the values are int64.
    """

    def call(typing: Any, *arguments: Any) -> Any:
        constants = [one.literal_value for one in arguments[:n_constants]]
        signature = result(*arguments[:n_constants], *[types.int64] * (len(arguments) - n_constants))

        def generate(context: Any, builder: ir.IRBuilder, _: Any, given: Any) -> ir.Value:
            value = emit(builder, *constants, *given[n_constants:])
            return context.get_dummy_value() if value is None else value

        return signature, generate

    vars(call)["__signature__"] = inspect.signature(emit)  # numba's typing context takes the builder's place
    return intrinsic(prefer_literal=True)(call)


def _emit_read(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, ir.IntType(64).as_pointer()))


read = inlined(_emit_read, 0, types.int64)
"""The int64 at an address."""


@intrinsic
def _take_task(typing: Any, job: Any) -> Any:
    """The number of a task of a job that nobody else gets."""

    def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return builder.atomic_rmw(
            "add", arguments[0], ir.IntType(64)(1), "seq_cst"
        )  # `program` counts on the order

    return types.int64(types.CPointer(types.int64)), generate


take_task: Any = _take_task
"""An intrinsic's first parameter is numba's own, which is not known to a type checker."""

njit: Any = numba.njit
"""Nor are its decorators."""
