"""The inner loops of the CPU's matmuls: some rows of activations times a block of 16 rows of weights.

Weights are in the layout of `quant.kernels.cpu.layout`. Activations come as the kernel of `quant.kernels.cpu.rounding`
leaves them: for every unit of theirs a float32 scale, the int32 −o · Σ x and the rounded x, arranged so that a word of
weights needs no more than a shift and a mask, with the tokens of a tile side by side. With `u` the stored unsigned
code, `o` = 8 or 128, and `s`, `a` the scales of weights and activations, the units of which lie in those of weights:

    y = Σ over units of weights  s · Σ over units of activations  a · (Σ u x  −  (o + zero) · Σ x)

The bracket is an exact integer below 2³¹: (q − zero) is below 2⁸ for 8 bits and x below 2¹⁵, for 128 columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

from llvmlite import ir

from quant.kernels.cpu.isa import ISAS, Isa
from quant.kernels.cpu.layout import ROWS
from quant.kernels.cpu.vectors import DOTS, F16, F32, I8, I16, I32, I64, Dot, Vectors

CHUNKS = 4
"""Vectors of 16 words in a step, the innermost loop: 256 bytes of weights, 32 columns of 4 bits or 16 of 8."""

MOST_PREFETCHING = 4
"""Rows of activations up to which memory is what a matmul waits for."""

X_HEADER_BYTES = 8
"""In front of a unit of activations, for each token: its scale and −o · Σ x."""

X_STEP_BYTES = 8 * CHUNKS
"""A token's activations in a step: two words for a chunk."""

SCALE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Kind:
    """What a kernel is made for; numba sees it by its name, by which it is also kept."""

    isa: Isa
    bits: int
    scale: str
    asymmetric: bool

    @property
    def name(self) -> str:
        return f"{self.isa.name} {self.bits} {self.scale} {'asym' if self.asymmetric else 'sym'}"

    @staticmethod
    def named(name: str) -> "Kind":
        isa, bits, scale, symmetry = name.split()[:4]
        return Kind(next(one for one in ISAS if one.name == isa), int(bits), scale, symmetry == "asym")

    @property
    def header_bytes(self) -> int:
        return ROWS * (SCALE_BYTES[self.scale] + self.asymmetric)


def emit_tile(
    builder: ir.IRBuilder,
    name: str,
    n_tokens: int,
    weights: ir.Value,
    x: ir.Value,
    y: ir.Value,
    y_stride: ir.Value,
    n_units: ir.Value,
    n_steps: ir.Value,
) -> None:
    """Write y (n_tokens, 16) float32 for a block of weights; y_stride is in bytes from token to token.

    name: of a kind. n_units: units of the block; n_steps: steps of a unit. From `weights` on all are int64; weights, x
    and y are addresses.
    """
    kind = Kind.named(name)
    lanes = kind.isa.lanes
    at_once = max(1, min(ROWS // lanes, kind.isa.accumulators // n_tokens))
    for first in range(0, ROWS // lanes, at_once):
        part = _Part(builder, kind, n_tokens, range(first, first + at_once))
        totals = part.multiply(weights, x, n_units, n_steps)
        for token in range(n_tokens):
            row = builder.add(y, builder.mul(y_stride, I64(token)))
            for at, vector in enumerate(part.vectors):
                part.v.store(totals[token * at_once + at], row, 4 * lanes * vector)


class _Part:
    """Some of the vectors that 16 rows make: as many as their sums, times the tokens, fit into registers."""

    def __init__(self, builder: ir.IRBuilder, kind: Kind, n_tokens: int, vectors: range) -> None:
        self.kind, self.n_tokens, self.vectors = kind, n_tokens, vectors
        self.v = Vectors(builder, kind.isa.lanes)
        self.dot: Dot = DOTS[kind.isa.name](self.v, kind.bits)
        self.sums_each = max(1, self.dot.chains // (n_tokens * len(vectors)))
        # They have chains of their own then: every other one.
        self.odd_in_place = self.dot.odd_in_place and kind.bits == 4 and self.sums_each % 2 == 0
        self.prefetches = n_tokens <= MOST_PREFETCHING and vectors.start == 0

    def multiply(
        self, weights: ir.Value, x: ir.Value, n_units: ir.Value, n_steps: ir.Value
    ) -> Sequence[ir.Value]:
        """The sums over all units, a vector of floats for each token and vector of the part."""
        v, nothing = self.v, [self.v.constant(self.v.floats, 0.0)] * (self.n_tokens * len(self.vectors))
        sums_of_unit = self._sums_of_narrow_units if self.kind.bits == 4 else self._sums_of_a_wide_unit

        def unit(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
            w, x, *totals = carried
            if self.prefetches:
                v.prefetch(w)
            codes, x, *sums = sums_of_unit(w, x, n_steps, nothing)
            return [codes, x, *self._scaled(w, sums, totals)]

        _, _, *totals = v.loop(n_units, [weights, x, *nothing], unit)
        return totals

    def _sums_of_narrow_units(
        self, w: ir.Value, x: ir.Value, n_steps: ir.Value, nothing: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Where the next unit of weights and of activations begin, and the sums of this one; every step of it has a
        unit of activations.
        """

        def step(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
            codes, x, *sums = carried
            words = self.v.offset(x, X_HEADER_BYTES * self.n_tokens)
            whole = self._step(codes, words, partial(self._corrections, w, x))
            return [*self._following(codes, words), *self._weighed(x, whole, sums)]

        return self.v.loop(n_steps, [self.v.offset(w, self.kind.header_bytes), x, *nothing], step)

    def _sums_of_a_wide_unit(
        self, w: ir.Value, x: ir.Value, n_steps: ir.Value, nothing: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """The same where all steps have one unit of activations."""

        def step(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
            codes, words, *sums = carried
            return [*self._following(codes, words), *self._step(codes, words, lambda: sums)]

        codes, words = (
            self.v.offset(w, self.kind.header_bytes),
            self.v.offset(x, X_HEADER_BYTES * self.n_tokens),
        )
        codes, words, *whole = self.v.loop(n_steps, [codes, words, *self._corrections(w, x)], step)
        return [codes, words, *self._weighed(x, whole, nothing)]

    def _following(self, codes: ir.Value, words: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Where the weights and the activations behind a step begin."""
        return self.v.offset(codes, CHUNKS * ROWS * 4), self.v.offset(words, X_STEP_BYTES * self.n_tokens)

    def _corrections(self, w: ir.Value, x: ir.Value) -> list[ir.Value]:
        """What the sums of a unit of activations start from: −(o + zero) · Σ x; for further chains 0."""
        v, sums = self.v, []
        zeros = [self._zeros(w, vector) for vector in self.vectors] if self.kind.asymmetric else []
        for token in range(self.n_tokens):
            common = v.splat(v.load(I32, x, X_HEADER_BYTES * token + 4))  # −o · Σ x
            for at in range(len(self.vectors)):
                start = common
                if zeros:
                    sum_x = v.builder.ashr(common, v.constant(v.ints, self.kind.bits - 1))
                    start = v.builder.add(common, v.builder.mul(zeros[at], sum_x))
                sums += [start] + [v.constant(v.ints, 0)] * (self.sums_each - 1)
        return sums

    def _zeros(self, w: ir.Value, vector: int) -> ir.Value:
        offset = ROWS * SCALE_BYTES[self.kind.scale] + self.v.lanes * vector
        zeros = self.v.load(ir.VectorType(I8, self.v.lanes), w, offset)
        return self.v.builder.sext(zeros, self.v.ints)

    def _step(self, codes: ir.Value, x: ir.Value, sums: Callable[[], Sequence[ir.Value]]) -> list[ir.Value]:
        """What `sums` emits with the products of one step; asked for late where they would only fill registers."""
        if not self.dot.sums_come_last:
            return self._products(codes, x, list(sums()))
        zeros = [self.dot.zero()] * (self.n_tokens * len(self.vectors) * self.sums_each)
        of_step = self._products(codes, x, zeros)
        return [self.dot.added(*pair) for pair in zip(sums(), of_step, strict=True)]

    def _products(self, codes: ir.Value, x: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Sums with the products of one step."""
        v, each = self.v, self.sums_each
        for chunk in range(CHUNKS):
            if self.prefetches and v.prefetching.every_line:
                v.prefetch(codes, 64 * chunk)
            for at, vector in enumerate(self.vectors):
                words = v.load(v.ints, codes, 64 * chunk + 4 * v.lanes * vector)
                for part in (0, 1):
                    w = self._unpacked(words, part)
                    for token in range(self.n_tokens):
                        common = self._common(x, token, 2 * chunk + part)
                        i = (token * len(self.vectors) + at) * each + (2 * chunk + part) % each
                        sums[i] = self.dot.add(sums[i], w, common)
        return sums

    def _common(self, x: ir.Value, token: int, word: int) -> ir.Value:
        """A word of a token's activations in every lane.

        x86 reads it so from memory. Arm multiplies by a lane of a register, for which four words are read at once.
        """
        offset = X_STEP_BYTES * token + 4 * word
        if self.kind.isa.name != "sdot":
            return self.v.splat(self.v.load(I32, x, offset))
        lane = word % self.v.lanes
        words = self.v.load(self.v.ints, x, offset - 4 * lane)
        return self.v.shuffle(words, [lane] * self.v.lanes)

    def _unpacked(self, words: ir.Value, part: int) -> ir.Value:
        """The even (0) or odd (1) codes of words, each in twice its bits; perhaps odd ones 16 times as large."""
        v = self.v
        if part and self.kind.bits == 8:
            halves = v.cast(words, I16, 16)
            return v.cast(v.builder.lshr(halves, v.constant(halves.type, 8)), I32, 32)
        if part and self.odd_in_place:
            return v.builder.and_(words, v.constant(words.type, 0xF0F0F0F0))
        if part:
            words = v.builder.lshr(words, v.constant(words.type, 4))
        return v.builder.and_(
            words, v.constant(words.type, 0x0F0F0F0F if self.kind.bits == 4 else 0x00FF00FF)
        )

    def _weighed(self, x: ir.Value, sums: Sequence[ir.Value], before: Sequence[ir.Value]) -> list[ir.Value]:
        """What was before, with the sums of a unit of activations times its scale."""
        v, each = self.v, self.sums_each
        new = []
        for i, one in enumerate(before):
            whole = self._whole(sums[i * each : (i + 1) * each])
            scale = v.splat(v.load(F32, x, X_HEADER_BYTES * (i // len(self.vectors))))
            new.append(v.multiply_add(v.builder.sitofp(whole, v.floats), scale, one))
        return new

    def _whole(self, chains: Sequence[ir.Value]) -> ir.Value:
        """The sum of chains; of odd codes in place they have multiples of 16, so that a shift loses nothing."""
        add = self.v.builder.add
        if not self.odd_in_place:
            return reduce(add, chains)
        odd = reduce(add, chains[1::2])
        return add(reduce(add, chains[::2]), self.v.builder.ashr(odd, self.v.constant(odd.type, 4)))

    def _scaled(self, w: ir.Value, sums: Sequence[ir.Value], totals: Sequence[ir.Value]) -> list[ir.Value]:
        """The totals with the sums of a unit of weights times its scales."""
        scales = [self._scales(w, vector) for vector in self.vectors]
        return [
            self.v.multiply_add(one, scales[i % len(scales)], total)
            for i, (one, total) in enumerate(zip(sums, totals, strict=True))
        ]

    def _scales(self, w: ir.Value, vector: int) -> ir.Value:
        v, scale = self.v, self.kind.scale
        offset = SCALE_BYTES[scale] * v.lanes * vector
        if scale == "f32":
            return v.load(v.floats, w, offset)
        if scale == "f16" and self.kind.isa.name != "plain":
            return v.builder.fpext(v.load(ir.VectorType(F16, v.lanes), w, offset), v.floats)
        halves = v.builder.zext(v.load(ir.VectorType(I16, v.lanes), w, offset), v.ints)
        if scale == "bf16":
            return v.builder.bitcast(v.builder.shl(halves, v.constant(v.ints, 16)), v.floats)
        return _floats_of_halves(v, halves)


def _floats_of_halves(v: Vectors, halves: ir.Value) -> ir.Value:
    """Finite float16 as float32 by their bits, for machines where LLVM would call a function for each.

    The exponent moves over by 13 bits and is then too small by 2¹¹², subnormal numbers' too.
    """
    builder = v.builder
    magnitude = builder.shl(builder.and_(halves, v.constant(v.ints, 0x7FFF)), v.constant(v.ints, 13))
    value = builder.fmul(builder.bitcast(magnitude, v.floats), v.constant(v.floats, 2.0**112))
    sign = builder.shl(builder.and_(halves, v.constant(v.ints, 0x8000)), v.constant(v.ints, 16))
    return builder.bitcast(builder.or_(builder.bitcast(value, v.ints), sign), v.floats)
