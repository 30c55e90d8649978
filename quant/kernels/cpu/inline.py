"""LLVM's instructions amid code that numba compiles."""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def inlined(emit: Callable[..., None], n_constants: int) -> Any:
    """What `emit(builder, *constants, *values)` emits, as a function for code that numba compiles.

    It takes the same arguments less the builder and returns nothing. The first `n_constants` must be known when it is
    compiled; the values are int64.
    """

    def call(typing: Any, *arguments: Any) -> Any:
        constants = [one.literal_value for one in arguments[:n_constants]]
        signature = types.void(*arguments[:n_constants], *[types.int64] * (len(arguments) - n_constants))

        def generate(context: Any, builder: ir.IRBuilder, _: Any, given: Any) -> ir.Value:
            emit(builder, *constants, *given[n_constants:])
            return context.get_dummy_value()

        return signature, generate

    vars(call)["__signature__"] = inspect.signature(emit)  # numba's typing context takes the builder's place
    return intrinsic(prefer_literal=True)(call)
