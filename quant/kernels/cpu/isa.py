"""Which vector instructions this machine has, and a cap on them.

`MISTRAL_CLI_CPU=avx2` runs, and compiles, as on a machine that has no more than that; every kernel is tested so, and
a processor that lies about itself can be helped. The choices are the names in `ISAS`.
"""

import functools
import os
import platform
from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Isa:
    """A set of instructions to multiply bytes with.

    features: what the processor must have, in LLVM's words. lanes: 32-bit numbers in a vector. tokens: rows of
    activations in the largest tile of a matmul. accumulators: how many vectors of sums it keeps in registers, as
    integers and as floats. cpu: an LLVM processor with these
    instructions and none of the better ones, to compile for under a cap; "" is the least of its architecture.
    """

    name: str
    machines: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    tokens: int
    accumulators: int
    cpu: str


_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")

ISAS = (
    Isa("avx512vnni", _X86, ("avx512vnni", "avx512bw", "avx512vl"), 16, 8, 8, "icelake-server"),
    Isa("avxvnni", _X86, ("avxvnni", "avx2", "fma", "f16c"), 8, 4, 4, "alderlake"),
    Isa("avx2", _X86, ("avx2", "fma", "f16c"), 8, 4, 4, "haswell"),
    Isa("sdot", _ARM, ("dotprod",), 4, 4, 8, "neoverse-n1"),
    Isa("plain", (), (), 4, 4, 4, ""),
)
"""Best first. The last is LLVM's portable vector arithmetic, for any machine."""

CAP = "MISTRAL_CLI_CPU"


def available() -> tuple[Isa, ...]:
    """What this machine has, best first."""
    has = llvm.get_host_cpu_features()
    machine = platform.machine()
    return tuple(
        isa
        for isa in ISAS
        if (not isa.machines or machine in isa.machines) and all(has.get(name) for name in isa.features)
    )


@functools.cache
def chosen() -> Isa:
    """The best that the machine has, or the one that the environment asks for.

    Raises:
        ImportError: the machine does not have what the environment asks for, so the kernels cannot be used.
    """
    asked, here = os.environ.get(CAP), {isa.name: isa for isa in available()}
    if not asked:
        return next(iter(here.values()))
    if asked not in here:
        raise ImportError(f"{CAP}={asked} is not one of what this machine has: {', '.join(here)}")
    return here[asked]


@functools.cache
def target() -> tuple[str, str]:
    """What to compile for: a processor and its features, as LLVM names them."""
    if os.environ.get(CAP):
        return chosen().cpu, ""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@dataclass(frozen=True)
class Prefetching:
    """How the lines of a weight are asked for: bytes ahead of a product, and into which of a core's caches, 1 or 2.

    every_line: of a weight that is one stream; else one of some hundred bytes or more, and the hardware gets the rest.
    """

    ahead_bytes: int
    cache: int
    every_line: bool


@functools.cache
def prefetching() -> Prefetching:
    """What suits the processor that is compiled for (`docs/log.md`).

    On Intel's processors the hardware alone reaches half of the memory's bandwidth. On AMD's, lines in the first cache
    take the places of what the hardware fetched, and rows of a dense weight, several short streams, of which no
    hardware follows any, gain most from far ahead. For one stream, a quantized weight, a Zen 4's hardware reaches most
    of the bandwidth: a line here and there takes it to nine tenths, while all of them would halve it. A Zen 3 needs
    them all for int4, at whatever distance. Of Zen 1, 2 and 5 it is assumed.
    """
    cpu = target()[0]
    if cpu.startswith("znver"):
        return Prefetching(ahead_bytes=12288, cache=2, every_line=cpu in ("znver1", "znver2", "znver3"))
    return Prefetching(ahead_bytes=2304, cache=1, every_line=True)


def compile_for_chosen() -> None:
    """Make numba compile for that and no more; to be called before it compiles anything."""
    from numba import config  # imported only here: the rest asks LLVM alone

    cpu, features = target()
    vars(config).update(CPU_NAME=cpu, CPU_FEATURES=features)
