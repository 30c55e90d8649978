"""Vectors of floats, in the types in which memory has them: what the CPU's kernels are written with beside arithmetic.

Everything is computed in float32. `numbers` names what memory has: "f32", "bf16", "f16" or "i8".
"""

import math
from collections.abc import Sequence

import torch
from llvmlite import ir

from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.vectors import F16, F32, I8, I16, I32, Vectors

NUMBERS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8"}
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1}

LOWEST = -87.0
"""exp of it is the least normal float32, about; `exp` takes anything below for it."""

_TO_INTEGER = 1.5 * 2.0**23
"""Added to a float32 below 2²², it leaves the nearest integer in its low bits, ties to even."""

_EXP = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""Taylor's coefficients, the highest first: off by 1.3e-7 of the result at most for |x| ≤ ln 2 / 2."""


def is_known(dtype: torch.dtype) -> bool:
    """Whether kernels load and store numbers of this type here; LLVM's portable float16 would be calls of functions."""
    return dtype in NUMBERS and not (dtype == torch.float16 and chosen().name == "plain")


def width_of(length: int) -> int:
    """Floats of a vector: as many as the machine has, and a divisor of the length of what it walks along."""
    return math.gcd(length, chosen().lanes)


def accumulators(width: int) -> int:
    """How many vectors of sums a tile keeps in registers: half of what AVX-512 and AVX2 have."""
    return max(8, width)


def load(v: Vectors, numbers: str, address: ir.Value, offset: int = 0) -> ir.Value:
    """`v.lanes` numbers from an address and so many bytes on, as float32."""
    if numbers == "f32":
        return v.load(v.floats, address, offset)
    if numbers == "f16":
        return v.builder.fpext(v.load(ir.VectorType(F16, v.lanes), address, offset), v.floats)
    if numbers == "i8":
        codes = v.load(ir.VectorType(I8, v.lanes), address, offset)
        return v.builder.sitofp(v.builder.sext(codes, v.ints), v.floats)
    bits = v.builder.zext(v.load(ir.VectorType(I16, v.lanes), address, offset), v.ints)
    return v.builder.bitcast(v.builder.shl(bits, v.constant(v.ints, 16)), v.floats)


def store(v: Vectors, numbers: str, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    """The reverse, rounded to the nearest, ties to even; whole numbers within ±127 for "i8"."""
    builder = v.builder
    if numbers == "f16":
        value = builder.fptrunc(value, ir.VectorType(F16, v.lanes))
    elif numbers == "i8":
        value = builder.trunc(rounded(v, value), ir.VectorType(I8, v.lanes))
    elif numbers == "bf16":
        bits = builder.bitcast(value, v.ints)
        odd = builder.and_(builder.lshr(bits, v.constant(v.ints, 16)), v.constant(v.ints, 1))
        nearest = builder.add(bits, builder.add(odd, v.constant(v.ints, 0x7FFF)))
        no_number = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(no_number, v.constant(v.ints, 0x7FC00000), nearest)
        value = builder.trunc(builder.lshr(kept, v.constant(v.ints, 16)), ir.VectorType(I16, v.lanes))
    v.store(value, address, offset)


def rounded(v: Vectors, value: ir.Value) -> ir.Value:
    """The nearest int32 of floats below 2²², ties to even."""
    shifted = v.builder.fadd(value, v.constant(v.floats, _TO_INTEGER))
    return v.builder.sub(v.builder.bitcast(shifted, v.ints), v.constant(v.ints, 0x4B400000))


def exp(v: Vectors, x: ir.Value) -> ir.Value:
    """e to the power of floats, off by 3e-7 of it at most; for x ≤ 88, and `LOWEST` for what is lower. NaN stays."""
    builder = v.builder
    low = v.constant(v.floats, LOWEST)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    n = rounded(v, builder.fmul(x, v.constant(v.floats, math.log2(math.e))))
    whole = builder.sitofp(n, v.floats)
    # ln 2 in two parts, the first of few bits, so that n times it is exact.
    rest = v.multiply_add(whole, v.constant(v.floats, -0.693359375), x)
    rest = v.multiply_add(whole, v.constant(v.floats, 2.12194440e-4), rest)
    power = v.constant(v.floats, _EXP[0])
    for coefficient in _EXP[1:]:
        power = v.multiply_add(power, rest, v.constant(v.floats, coefficient))
    exponent = builder.shl(builder.add(n, v.constant(v.ints, 127)), v.constant(v.ints, 23))
    return builder.fmul(power, builder.bitcast(exponent, v.floats))


def total(v: Vectors, value: ir.Value) -> ir.Value:
    """The sum of a vector's lanes, in pairs of pairs."""
    while value.type.count > 1:
        half = value.type.count // 2
        low, high = (v.shuffle(value, range(start, start + half)) for start in (0, half))
        value = v.builder.fadd(low, high)
    return v.builder.extract_element(value, I32(0))


def totals(v: Vectors, vectors: Sequence[ir.Value]) -> ir.Value:
    """The sums of the lanes of `v.lanes` vectors, one in each lane."""
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [_paired(v, *pair, half) for pair in zip(vectors[:half], vectors[half:], strict=True)]
    return vectors[0]


def _paired(v: Vectors, a: ir.Value, b: ir.Value, half: int) -> ir.Value:
    """Halves of the sums of two vectors in turn: lanes that belong to `a` where the bit `half` of their number is 0."""
    kept = [lane if not lane & half else lane - half + v.lanes for lane in range(v.lanes)]
    moved = [lane + half if not lane & half else lane + v.lanes for lane in range(v.lanes)]
    mask = [ir.Constant(ir.VectorType(I32, v.lanes), lanes) for lanes in (kept, moved)]
    return v.builder.fadd(*(v.builder.shuffle_vector(a, b, one) for one in mask))


def largest(v: Vectors, value: ir.Value) -> ir.Value:
    """The largest of a vector's lanes."""
    while value.type.count > 1:
        half = value.type.count // 2
        low, high = (v.shuffle(value, range(start, start + half)) for start in (0, half))
        value = v.builder.select(v.builder.fcmp_ordered(">", low, high), low, high)
    return v.builder.extract_element(value, I32(0))


def constants(v: Vectors, values: Sequence[float], element: ir.Type = F32) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, v.lanes), list(values))
