"""Kernels compiled by numba, and their object code.

numba makes two functions of one: the kernel, which returns whether it raised something, and the C function that calls
it and then, if it did, takes Python's lock and prints that. Kernels raise nothing, and code that is kept must not need
what only numba has, so the C function is cut off behind the call.

The text that numba gives has been through LLVM's code generator once. To send it there again costs 10 to 60 ms a kernel
and no speed: within 1 % of the time of numba's own code, and the same bits (`docs/log.md`).
"""

import re

import llvmlite.binding as llvm
from numba import cfunc, types

from quant.kernels.cpu.isa import compile_for_chosen
from quant.kernels.cpu.machine_code import ENTRY, Code

compile_for_chosen()  # before anything is compiled

_ADDRESSES = "numba.dynamic.globals"
"""What numba calls variables that have the address of something in this process."""

JOB = types.CPointer(types.int64)


class Compiled:
    """A kernel that numba has compiled; its code lives as long as this."""

    def __init__(self, function: Code) -> None:
        self._made = cfunc(types.void(JOB), error_model="numpy")(function)

    @property
    def address(self) -> int:
        address = self._made.address
        assert address is not None
        return address

    def object_code(self, machine: llvm.TargetMachine) -> bytes | None:
        """As a file that defines the C function `ENTRY`; None for a kernel that can raise, or calls Python or numba."""
        text = bare(self._made.inspect_llvm(), self._made.native_name)
        if text is None or needed(text):
            return None
        code: bytes = machine.emit_object(llvm.parse_assembly(text))
        return code


def bare(text: str, name: str) -> str | None:
    """A module's text with its C function `name` called `ENTRY` and cut off behind its call of the kernel.

    None where the kernel can return anything but 0, which says that nothing was raised.
    """
    lines = r"(?:(?!}).*\n)*?"
    head, call = rf'^(define .*?(\S+) @)"?{re.escape(name)}"?(\(.*\n)', rf"({lines}.*\bcall\b.*\bi32 @.*\n)"
    text, n_found = re.subn(
        rf"{head}{call}{lines}}}\n", rf"\1{ENTRY}\3\4  ret \2 null\n}}\n", text, count=1, flags=re.MULTILINE
    )
    statuses = re.findall(r"^ +ret i32 (.*)$", text, flags=re.MULTILINE)
    return text if n_found == 1 and statuses and all(one == "0" for one in statuses) else None


def needed(text: str) -> set[str]:
    """What a module uses of this process, so that its code is wrong in another.

    That is what it does not define, except for LLVM's intrinsics, which libc and libm have if need be, and addresses.
    """
    module = llvm.parse_assembly(text)
    symbols = [*module.functions, *module.global_variables]
    foreign = [one.name for one in symbols if one.is_declaration and not one.name.startswith("llvm.")]
    used = {name for name in foreign if len(re.findall(rf'@"?{re.escape(name)}(?![\w.$])', text)) > 1}
    return used | {one.name for one in symbols if one.name.startswith(_ADDRESSES)}
