"""Kernels by what they are made of: read from disk as object code, or compiled and kept there.

A kernel is what `code(*parameters)` returns, a Python function of a job (`quant.kernels.cpu.pool`) that numba compiles.
One that is kept is linked by LLVM alone, in 1.5 ms: `code` is not called, and numba is not imported, which with what it
sets up for the first function takes 0.6 s.
"""

import functools
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from quant.kernels.cpu.isa import chosen, target
from quant.kernels.cpu.object_code import Folder

Code = Callable[[Any], None]
"""A kernel before it is compiled."""

ENTRY = "kernel"
"""The symbol of the C function in every object."""

_PACKAGE = Path(__file__).parent


@functools.cache
def kernel(code: Callable[..., Code], *parameters: int | str) -> int:
    """The address of the kernel `code(*parameters)`, a C function of the address of a job.

    Raises:
        ImportError: it is not kept, and numba cannot be imported.
    """
    folder = _folder(Path(code.__code__.co_filename).parent)
    asked = f"{code.__module__}:{code.__qualname__} {parameters!r}"
    name = f"{code.__name__.strip('_')}-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.o"
    kept = folder.read(name)
    if kept is not None:
        return _linked(kept)
    from quant.kernels.cpu.compiling import Compiled  # imports numba

    made = Compiled(code(*parameters))
    compiled = made.object_code(target_machine())
    if compiled is None:
        _ALIVE.append(made)
        return made.address
    address = _linked(compiled)
    folder.write(name, compiled)
    return address


def target_machine() -> llvm.TargetMachine:
    """LLVM for this processor, or for the one that stands for it under a cap; options as numba has them."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    host = llvm.Target.from_triple(llvm.get_process_triple())
    cpu, features = target()
    return host.create_target_machine(
        cpu=cpu,
        features=features,
        opt=3,
        reloc="static" if host.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


_ALIVE: list[Any] = []
"""Code lives as long as what linked it."""


def _linked(code: bytes) -> int:
    """The address of an object's kernel. Each has an engine of its own, so that their symbols cannot meet."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    file = llvm.ObjectFileRef.from_data(code)
    engine.add_object_file(file)
    engine.finalize_object()
    _ALIVE.append((engine, file))
    address: int = engine.get_function_address(ENTRY)
    return address


@functools.cache
def _folder(package: Path) -> Folder:
    """Of the kernels in a package, which may be made of what is in this one."""
    versions = [
        sys.implementation.cache_tag,
        platform.python_version(),
        np.__version__,
        *(_version(name) for name in ("numba", "llvmlite")),
    ]
    source = _digest(_PACKAGE, package)
    made_for = (llvm.get_process_triple(), chosen().name, *target())
    return Folder(package, "\n".join((*map(str, versions), *made_for, source)))


def _version(package: str) -> str:
    """Of a package that need not be imported; takes 0.5 ms.

    Raises:
        ImportError: it is not there.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # one that no package manager knows
        return str(importlib.import_module(package).__version__)


def _digest(*folders: Path) -> str:
    """Of the source in folders of kernels."""
    files = sorted({file for folder in folders for file in folder.glob("*.py")})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if not _folder(_PACKAGE).is_there():
    # Whether numba works here (with this Python and NumPy) shows before an operator is told that it has kernels. If
    # something is kept, it did.
    importlib.import_module("numba")
