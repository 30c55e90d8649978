"""The innermost arithmetic of the matmuls for few rows: a word of weights times the activations that it meets.

Each function exists twice: as inline PTX for NVIDIA's cards, and as plain Triton for the interpreter and for
other vendors. A word is 32 bits of codes as they are stored: 8 of `q + 8` or 4 of `q + 128`. `x0`, `x1`, … are
the planes of the activations (`quant.kernels.activations`): words of 4 int8 or of 2 float16.
"""

import triton
import triton.language as tl


@triton.jit
def dot_int4_int8(q, x0, x1, PTX: tl.constexpr):
    """`Σ (q + 8) x` over the 8 columns of each word, int32; x0 meets the even nibbles, x1 the odd ones."""
    if PTX:
        q, x0 = tl.broadcast(q, x0)
        q, x1 = tl.broadcast(q, x1)
        result = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd, sum;
            and.b32 even, $1, 0x0f0f0f0f;
            shr.u32 odd, $1, 4;
            and.b32 odd, odd, 0x0f0f0f0f;
            dp4a.u32.s32 sum, even, $2, 0;
            dp4a.u32.s32 $0, odd, $3, sum;
            }
            """,
            "=r,r,r,r",
            [q, x0, x1],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        result = _dot_bytes(q & 0x0F0F0F0F, x0) + _dot_bytes((q >> 4) & 0x0F0F0F0F, x1)
    return result


@triton.jit
def dot_int8_int8(q, x0, PTX: tl.constexpr):
    """`Σ (q + 128) x` over the 4 columns of each word, int32."""
    if PTX:
        q, x0 = tl.broadcast(q, x0)
        result = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, 0;",
            "=r,r,r",
            [q, x0],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        result = _dot_bytes(q, x0)
    return result


@triton.jit
def _dot_bytes(q, x):
    """Unsigned bytes of q times signed bytes of x, int32."""
    total = (q & 255) * (x << 24 >> 24)
    for byte in tl.static_range(1, 4):
        total += ((q >> (8 * byte)) & 255) * (x << (24 - 8 * byte) >> 24)
    return total


@triton.jit
def dot_int4_half(q, x0, x1, x2, x3, PTX: tl.constexpr):
    """`Σ q x` over the 8 columns of each word, float32; plane j has columns j and j + 4.

    A nibble in the low bits of a float16 whose bits are 0x6400 makes it 1024 + nibble, and a nibble four bits
    higher 1024 + 16 nibble: a logical operation unpacks two weights (the trick is Kim et al. 2022's).
    """
    if PTX:
        q, x0 = tl.broadcast(q, x0)
        q, x1 = tl.broadcast(q, x1)
        q, x2 = tl.broadcast(q, x2)
        q, x3 = tl.broadcast(q, x3)
        result = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 h0, h1, h2, h3, rest, sum, minus1032, sixteenth, minus72;
            .reg .b16 low, high;
            .reg .f32 f0, f1;
            mov.b32 minus1032, 0xe408e408;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 minus72, 0xd480d480;
            shr.u32 rest, $1, 8;
            lop3.b32 h0, $1, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 h1, $1, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 h2, rest, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 h3, rest, 0x00f000f0, 0x64006400, 0xea;
            add.f16x2 h0, h0, minus1032;
            fma.rn.f16x2 h1, h1, sixteenth, minus72;
            add.f16x2 h2, h2, minus1032;
            fma.rn.f16x2 h3, h3, sixteenth, minus72;
            mul.f16x2 sum, h0, $2;
            fma.rn.f16x2 sum, h1, $3, sum;
            fma.rn.f16x2 sum, h2, $4, sum;
            fma.rn.f16x2 sum, h3, $5, sum;
            mov.b32 {low, high}, sum;
            cvt.f32.f16 f0, low;
            cvt.f32.f16 f1, high;
            add.f32 $0, f0, f1;
            }
            """,
            "=f,r,r,r,r,r",
            [q, x0, x1, x2, x3],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        result = _dot_halves(_nibble(q, 0), _nibble(q, 4), x0)
        result += _dot_halves(_nibble(q, 1), _nibble(q, 5), x1)
        result += _dot_halves(_nibble(q, 2), _nibble(q, 6), x2)
        result += _dot_halves(_nibble(q, 3), _nibble(q, 7), x3)
    return result


@triton.jit
def dot_int8_half(q, x0, x1, PTX: tl.constexpr):
    """`Σ q x` over the 4 columns of each word, float32; x0 has columns 0 and 1, x1 columns 2 and 3."""
    if PTX:
        q, x0 = tl.broadcast(q, x0)
        q, x1 = tl.broadcast(q, x1)
        result = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 h0, h1, sum, minus1152;
            .reg .b16 low, high;
            .reg .f32 f0, f1;
            mov.b32 minus1152, 0xe480e480;
            prmt.b32 h0, $1, 0x64646464, 0x4140;
            prmt.b32 h1, $1, 0x64646464, 0x4342;
            add.f16x2 h0, h0, minus1152;
            add.f16x2 h1, h1, minus1152;
            mul.f16x2 sum, h0, $2;
            fma.rn.f16x2 sum, h1, $3, sum;
            mov.b32 {low, high}, sum;
            cvt.f32.f16 f0, low;
            cvt.f32.f16 f1, high;
            add.f32 $0, f0, f1;
            }
            """,
            "=f,r,r,r",
            [q, x0, x1],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        result = _dot_halves(_byte(q, 0), _byte(q, 1), x0)
        result += _dot_halves(_byte(q, 2), _byte(q, 3), x1)
    return result


@triton.jit
def unpack_int4(q, PLANE: tl.constexpr, PTX: tl.constexpr):
    """The nibble PLANE of each int16, less 8: bfloat16 of q's shape by PTX, else float32.

    A nibble in the low bits of a bfloat16 whose bits are 0x4300 makes it 128 + nibble.
    """
    SHIFT: tl.constexpr = 4 * PLANE
    if PTX:
        result = tl.inline_asm_elementwise(
            f"""
            {{
            .reg .b32 h, one, minus136;
            mov.b32 one, 0x3f803f80;
            mov.b32 minus136, 0xc308c308;
            shr.u32 h, $1, {SHIFT};
            lop3.b32 h, h, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, h, one, minus136;
            }}
            """,
            "=r,r",
            [q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        result = (((q >> SHIFT) & 15) - 8).to(tl.float32)
    return result


@triton.jit
def unpack_int8(q, PLANE: tl.constexpr, PTX: tl.constexpr):
    """The byte PLANE of each int16, less 128: bfloat16 of q's shape by PTX, else float32.

    A bfloat16 with the bits 0x4300 takes 7 bits; the eighth chooses whether 128 or 256 is subtracted.
    """
    SHIFT: tl.constexpr = 8 * PLANE
    if PTX:
        result = tl.inline_asm_elementwise(
            f"""
            {{
            .reg .b32 h, low, minus, one;
            mov.b32 one, 0x3f803f80;
            shr.u32 h, $1, {SHIFT};
            lop3.b32 low, h, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 minus, h, 0x00800080, 0xc380c380, 0x6a;
            fma.rn.bf16x2 $0, low, one, minus;
            }}
            """,
            "=r,r",
            [q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        result = (((q >> SHIFT) & 255) - 128).to(tl.float32)
    return result


@triton.jit
def add_bfloat16(a, b, PTX: tl.constexpr):
    """a + b of the same shape."""
    if PTX:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        result = a + b
    return result


@triton.jit
def multiply_bfloat16(a, b, PTX: tl.constexpr):
    """a · b of the same shape."""
    if PTX:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        result = a * b
    return result


@triton.jit
def dequantize_int4(q, scale, minus, PTX: tl.constexpr):
    """`(q + 8 - minus) scale` of the 8 columns of each word, in four words of two bfloat16 each; rounded once.

    scale: bfloat16; minus: float32, small integers; both of q's shape. The nibbles are unpacked as in `unpack_int4`.
    """
    if PTX:
        scale = _twice(scale)
        minus = _twice((-128 - minus).to(tl.bfloat16))
        result = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 odd, h, one, zero;
            mov.b32 one, 0x3f803f80;
            mov.b32 zero, 0x80008000;
            shr.u32 odd, $4, 4;
            prmt.b32 h, $4, odd, 0x0400;
            lop3.b32 h, h, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 h, h, one, $6;
            fma.rn.bf16x2 $0, h, $5, zero;
            prmt.b32 h, $4, odd, 0x0501;
            lop3.b32 h, h, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 h, h, one, $6;
            fma.rn.bf16x2 $1, h, $5, zero;
            prmt.b32 h, $4, odd, 0x0602;
            lop3.b32 h, h, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 h, h, one, $6;
            fma.rn.bf16x2 $2, h, $5, zero;
            prmt.b32 h, $4, odd, 0x0703;
            lop3.b32 h, h, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 h, h, one, $6;
            fma.rn.bf16x2 $3, h, $5, zero;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r",
            [q, scale, minus],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        wide = scale.to(tl.float32)
        result = (
            _pair(q, 0, wide, minus),
            _pair(q, 1, wide, minus),
            _pair(q, 2, wide, minus),
            _pair(q, 3, wide, minus),
        )
    return result


@triton.jit
def _twice(x):
    """A bfloat16 in both halves of an int32."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _pair(q, index: tl.constexpr, scale, minus):
    """Columns 2 index and 2 index + 1, as bfloat16 in the halves of an int32."""
    low = ((((q >> (8 * index)) & 15).to(tl.float32) - minus) * scale).to(tl.bfloat16)
    high = ((((q >> (8 * index + 4)) & 15).to(tl.float32) - minus) * scale).to(tl.bfloat16)
    high_bits = high.to(tl.int16, bitcast=True).to(tl.int32)
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high_bits << 16)


@triton.jit
def _nibble(q, index: tl.constexpr):
    return (((q >> (4 * index)) & 15) - 8).to(tl.float32)


@triton.jit
def _byte(q, index: tl.constexpr):
    return (((q >> (8 * index)) & 255) - 128).to(tl.float32)


@triton.jit
def _dot_halves(w0, w1, x):
    """w0 and w1 times the float16 in the low and in the high half of each word of x."""
    low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = ((x >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return w0 * low.to(tl.float32) + w1 * high.to(tl.float32)
