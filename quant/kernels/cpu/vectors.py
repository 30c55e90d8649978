"""LLVM's vector instructions, as far as the kernels need them: a thin layer over llvmlite's builder.

numba's own vectorizer finds no dot products of bytes, so the inner loops are written in LLVM's language. Addresses
are 64-bit integers, as they come from `Tensor.data_ptr`.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from quant.kernels.cpu.isa import prefetching

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class Vectors:
    """Emits instructions on vectors of `lanes` 32-bit numbers, at the place where `builder` stands."""

    def __init__(self, builder: ir.IRBuilder, lanes: int) -> None:
        self.builder = builder
        self.lanes = lanes
        self.prefetching = prefetching()
        self.ints, self.floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)

    def load(self, kind: ir.Type, address: ir.Value, offset: int = 0) -> ir.Value:
        pointer = self.builder.inttoptr(self.offset(address, offset), kind.as_pointer())
        return self.builder.load(pointer, align=1)

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        pointer = self.builder.inttoptr(self.offset(address, offset), value.type.as_pointer())
        self.builder.store(value, pointer, align=1)

    def prefetch(self, address: ir.Value, offset: int = 0) -> None:
        """Ask for a line before it is needed; one outside of the process's memory does no harm."""
        how = self.prefetching
        pointer = self.builder.inttoptr(self.offset(address, how.ahead_bytes + offset), I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        prefetch = self.builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        read, keep, data = (I32(flag) for flag in (0, 4 - how.cache, 1))
        self.builder.call(prefetch, [pointer, read, keep, data])

    def offset(self, address: ir.Value, by: int) -> ir.Value:
        return self.builder.add(address, I64(by)) if by else address

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A scalar in every lane."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(one, [0] * self.lanes)

    def shuffle(self, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def constant(self, kind: ir.VectorType, value: float) -> ir.Constant:
        return ir.Constant(kind, [value] * kind.count)

    def cast(self, vector: ir.Value, element: ir.Type, bits: int) -> ir.Value:
        """The same bits as a vector of elements of that many bits."""
        n_bits = self.lanes * 32
        return self.builder.bitcast(vector, ir.VectorType(element, n_bits // bits))

    def call(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [one.type for one in arguments]), name)
        return self.builder.call(function, arguments)

    def multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x · y + z of floats, fused where the machine can."""
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(product, z, flags=("contract",))

    def loop(
        self,
        n: ir.Value,
        carried: Sequence[ir.Value],
        body: Callable[[Sequence[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """Run `body` n ≥ 1 times, from `carried` to what it returns; gives the last of that."""
        builder = self.builder
        before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(inside)
        builder.position_at_end(inside)
        phis = [builder.phi(start.type) for start in (I64(0), *carried)]
        for phi, start in zip(phis, (I64(0), *carried), strict=True):
            phi.add_incoming(start, before)
        results = [builder.add(phis[0], I64(1)), *body(phis[1:])]
        for phi, result in zip(phis, results, strict=True):
            phi.add_incoming(result, builder.block)
        builder.cbranch(builder.icmp_signed("<", results[0], n), inside, after)
        builder.position_at_end(after)
        return results[1:]


class Dot:
    """Multiplies words: `add` adds to every lane of a vector of int32 sums what its word and a common word give.

    Here as LLVM's portable arithmetic; subclasses have the instruction of a machine. Weights are unsigned:
    4 × 8 bits of 0 … 15, met by 4 × 8 bits of −127 … 127; or, where `bits` is 8, 2 × 16 bits of 0 … 255, met by
    2 × 16 bits of −32767 … 32767. No sum here leaves its type in a step, nor in a unit of 128 columns.
    """

    chains = 1
    """Independent sums that hide the latency of one."""

    odd_in_place = False
    """Whether odd codes may be multiplied where they are, above the even ones, and their sum shifted down instead."""

    sums_come_last = False
    """Whether a step is summed by itself, from `zero`, and then `added` to the sums."""

    def __init__(self, vectors: Vectors, bits: int) -> None:
        self.v, self.bits = vectors, bits

    def add(self, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        if self.bits == 8:
            return self._add_pairs(sums, w, x)
        eight, mask = self.v.constant(ir.VectorType(I16, 2 * self.v.lanes), 8), 0x00FF00FF
        halves = self.v.cast(x, I16, 16)
        even = self.v.builder.ashr(self.v.builder.shl(halves, eight), eight)
        odd = self.v.builder.ashr(halves, eight)
        low = self.v.builder.and_(w, self.v.constant(w.type, mask))
        high = self.v.builder.and_(
            self.v.builder.lshr(w, self.v.constant(w.type, 8)), self.v.constant(w.type, mask)
        )
        return self._add_pairs(self._add_pairs(sums, low, even), high, odd)

    def zero(self) -> ir.Value:
        """What the sum of a step starts from."""
        return self.v.constant(self.v.ints, 0)

    def added(self, sums: ir.Value, of_step: ir.Value) -> ir.Value:
        """The sums with that of a step."""
        return self.v.builder.add(sums, of_step)

    def _add_pairs(self, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        builder, wide = self.v.builder, ir.VectorType(I32, 2 * self.v.lanes)
        w, x = (builder.sext(self.v.cast(one, I16, 16), wide) for one in (w, x))
        products = builder.mul(w, x)
        even, odd = (self.v.shuffle(products, range(parity, 2 * self.v.lanes, 2)) for parity in (0, 1))
        return builder.add(sums, builder.add(even, odd))


class VnniDot(Dot):
    """AVX-512 VNNI and AVX-VNNI: an instruction for 4 products of bytes or 2 of 16 bits, without saturation.

    Declared with factors of 32-bit words, as LLVM had it up to version 21; later ones, which want bytes (or 16 bits),
    rewrite that when they read the module. The other way round would be an error.
    """

    chains = 4
    odd_in_place = True

    def add(self, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        name = f"llvm.x86.avx512.{'vpdpbusd' if self.bits == 4 else 'vpdpwssd'}.{32 * self.v.lanes}"
        return self.v.call(name, sums.type, [sums, w, x])


class Avx2Dot(Dot):
    """AVX2: `pmaddubsw` for 4 bits, which saturates at 16 bits, and `pmaddwd` for 8 bits, which does not.

    A pair of products of 4 bits is at most 2 · 15 · 127 = 3810, and the 8 of a step 30480 < 2¹⁵; so a step is summed
    in 16 bits and only then widened. 8-bit weights would saturate there (2 · 255 · 127 = 64770): they are
    met by 16-bit activations at the same price.
    """

    def __init__(self, vectors: Vectors, bits: int) -> None:
        super().__init__(vectors, bits)
        self.sums_come_last = bits == 4

    def zero(self) -> ir.Value:
        return self.v.constant(ir.VectorType(I16, 2 * self.v.lanes), 0)

    def add(self, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        pairs = ir.VectorType(I16, 2 * self.v.lanes)
        if self.bits == 8:
            words = [self.v.cast(one, I16, 16) for one in (w, x)]
            return self.v.builder.add(sums, self.v.call("llvm.x86.avx2.pmadd.wd", self.v.ints, words))
        words = [self.v.cast(one, I8, 8) for one in (w, x)]
        return self.v.builder.add(sums, self.v.call("llvm.x86.avx2.pmadd.ub.sw", pairs, words))

    def added(self, sums: ir.Value, of_step: ir.Value) -> ir.Value:
        ones = self.v.constant(of_step.type, 1)
        return self.v.builder.add(sums, self.v.call("llvm.x86.avx2.pmadd.wd", self.v.ints, [of_step, ones]))


class SdotDot(Dot):
    """Arm with dotprod: `sdot` for 4 bits, and for 8 bits `mla`, a column of every row at a time."""

    chains = 4

    def add(self, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        if self.bits == 8:
            return self._add_pairs(sums, w, x)
        words = [self.v.cast(one, I8, 8) for one in (w, x)]
        return self.v.call("llvm.aarch64.neon.sdot.v4i32.v16i8", sums.type, [sums, *words])

    def _add_pairs(self, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        builder, half = self.v.builder, self.v.constant(self.v.ints, 16)
        low = builder.mul(
            builder.and_(w, self.v.constant(w.type, 0xFFFF)), builder.ashr(builder.shl(x, half), half)
        )
        high = builder.mul(builder.lshr(w, half), builder.ashr(x, half))
        return builder.add(builder.add(sums, low), high)


DOTS: dict[str, type[Dot]] = {
    "avx512vnni": VnniDot,
    "avxvnni": VnniDot,
    "avx2": Avx2Dot,
    "sdot": SdotDot,
    "plain": Dot,
}
