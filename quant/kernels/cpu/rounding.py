"""Activations rounded for the CPU's matmuls: to 8 bits for weights of 4, to 16 bits for weights of 8.

Per unit of columns (`Interleaved.x_unit`): x ≈ scale · q with |q| ≤ 127 or 32767, scale = max |x| / 127 or / 32767. So
each x is off by at most half a scale. Eight bits add 0.55 % to a product of normal activations, where 4-bit weights are
off by 10 %; 8-bit weights are off by 0.8 %, so they meet 16 bits, at the same price on machines with `vpdpwssd` or
`pmaddwd`: 0.002 %.

The q are in the order in which a word of weights unpacks: of 8 columns the even, then the odd ones (int8); of 4 columns
the even, then the odd ones (int16). 32 bytes of them are what a step of a matmul reads of a token. A unit of a tile
has the float32 scale and the int32 −o · Σ q of each token, then step by step the 32 bytes of each token. A unit with a
NaN or an infinity has NaN for its scale, so that the product has it too.
"""

from collections.abc import Sequence

from llvmlite import ir

from quant.kernels.cpu.tile import X_HEADER_BYTES, X_STEP_BYTES
from quant.kernels.cpu.vectors import F32, I8, I16, I32, I64, Vectors

LARGEST = {4: 127, 8: 32767}
"""By the bits of the weights. −128 and −32768 are left out: they could make sums of 16 or 32 bits overflow."""

COLUMNS = 32
"""Columns rounded in one go."""

TINY = 1e-30
"""A unit with nothing larger counts as zeros: 127 / max could be infinite."""

_TO_INTEGER = 1.5 * 2.0**23
"""Added to a float32 below 2²², it leaves the nearest integer in its low bits, ties to even, on any machine."""


def x_unit_bytes(bits: int, unit: int) -> int:
    """Bytes of a token's unit of activations for weights of `bits` bits."""
    return X_HEADER_BYTES + unit * (bits // 4)


def emit_round_unit(
    builder: ir.IRBuilder,
    bits: int,
    x: ir.Value,
    n_columns: ir.Value,
    header: ir.Value,
    out: ir.Value,
    stride: ir.Value,
) -> None:
    """Round a unit of a token, n_columns float32 at address x.

    Scale and sum go to the address header, the bytes of steps to out, out + stride and so on.
    """
    v = Vectors(builder, COLUMNS)
    n = builder.sdiv(n_columns, I64(COLUMNS))
    x_step, steps = COLUMNS * 4, COLUMNS * bits // (4 * X_STEP_BYTES)
    none = v.constant(v.floats, 0.0)

    def look(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, largest, spoilt = carried
        value = v.load(v.floats, at)
        magnitude = v.call(f"llvm.fabs.v{COLUMNS}f32", v.floats, [value])
        larger = builder.fcmp_ordered(">", magnitude, largest)
        # 0 · x is 0, or NaN where x is NaN or infinite.
        return [
            v.offset(at, x_step),
            builder.select(larger, magnitude, largest),
            builder.fadd(spoilt, builder.fmul(value, none)),
        ]

    _, largest, spoilt = v.loop(n, [x, none, none], look)
    most = _reduce(v, "fmax", F32, [largest])
    inverse = builder.fdiv(F32(LARGEST[bits]), most)
    inverse = builder.select(builder.fcmp_ordered(">", most, F32(TINY)), inverse, F32(0.0))
    inverses = v.splat(inverse)

    def write(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, to, sums = carried
        shifted = builder.fadd(
            builder.fmul(v.load(v.floats, at), inverses), v.constant(v.floats, _TO_INTEGER)
        )
        q = builder.sub(builder.bitcast(shifted, v.ints), v.constant(v.ints, 0x4B400000))
        narrow = builder.trunc(q, ir.VectorType(I8 if bits == 4 else I16, COLUMNS))
        order = _order(bits)
        for start in range(0, COLUMNS, COLUMNS // steps):
            v.store(v.shuffle(narrow, order[start : start + COLUMNS // steps]), to)
            to = builder.add(to, stride)
        return [v.offset(at, x_step), to, builder.add(sums, q)]

    _, _, sums = v.loop(n, [x, out, v.constant(v.ints, 0)], write)
    scale = builder.fdiv(most, F32(LARGEST[bits]))
    scale = builder.select(builder.fcmp_ordered(">", most, F32(TINY)), scale, F32(0.0))
    v.store(builder.fadd(scale, _reduce(v, "fadd", F32, [F32(0.0), spoilt])), header)
    offset = 1 << bits - 1  # what stored codes of weights are shifted by
    v.store(builder.mul(_reduce(v, "add", I32, [sums]), I32(-offset)), header, 4)


def _order(bits: int) -> list[int]:
    """The columns of `COLUMNS` as words of weights unpack."""
    a_word = 32 // bits
    return [
        word + parity + 2 * i
        for word in range(0, COLUMNS, a_word)
        for parity in (0, 1)
        for i in range(a_word // 2)
    ]


def _reduce(v: Vectors, operation: str, element: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """One number of all lanes of the last argument."""
    suffix = f"v{v.lanes}{'f32' if element == F32 else 'i32'}"
    return v.call(f"llvm.vector.reduce.{operation}.{suffix}", element, arguments)
