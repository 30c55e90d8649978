"""Matmuls for 1 to 16 rows in Triton: a weight's bytes stream past once, and what follows is done on the way.

Decoding is a race against memory bandwidth. A layer of a transformer is four of these kernels and one of attention,
because each hands on activations that are ready for the next (`quant.kernels.activations`), and because
RMSNorm is not a step of its own: its division by the root mean square is one number for each row, so it
commutes with the product. Whoever adds to the residual stream leaves `h · norm_weight`, packed, and the sums of
h² by blocks of 32 columns; the next product is divided at its end.
"""

from dataclasses import dataclass
from typing import Any, Literal  # noqa: F401  Any is in a comment, for Triton takes no annotation

import torch
import triton
import triton.language as tl

from quant.kernels.activations import BLOCK, Activations, quad_columns
from quant.kernels.blockings import Blocking, Kernel, blocking_for
from quant.kernels.epilogue import before_sum, finish, gated, norm_of, root_mean_square, squares_of
from quant.kernels.ptx import dot_int4_half, dot_int4_int8, dot_int8_half, dot_int8_int8
from quant.kernels.tiles import TILE_WORDS, tile_kernel

MOST_ROWS = 16

_INTERPRETED = triton.knobs.runtime.interpret

Epilogue = Literal["store", "add", "add_and_pack", "swiglu_and_pack"]
"""What becomes of the product y: it is stored; it is added to what is there; the sum is also packed for the next
matmul, behind an RMSNorm; or it is the gate and the input of a SwiGLU, whose output is packed."""


@dataclass(frozen=True)
class Weight:
    """What a kernel reads of a linear layer, as it is stored.

    words: (out_features, in_features · bits / 32) int32, or the dense weight itself where `bits` is 16. scales and
    zeros: (out_features, n_groups), float and int8; zeros None where they are all 0.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int

    @staticmethod
    def dense(weight: torch.Tensor) -> "Weight":
        return Weight(weight, weight, None, 16)

    @staticmethod
    def quantized(
        qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
    ) -> "Weight":
        """From the tensors of `quant.ops.int4_matmul` or `int8_matmul`."""
        return Weight(qweight.view(torch.int32), scales, zeros, bits)

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * (1 if self.bits == 16 else 32 // self.bits)

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[1]

    @property
    def supported(self) -> bool:
        """Whether the kernels take it: whole blocks of columns, and groups of whole quads."""
        whole = self.in_features % BLOCK == 0 and self.out_features % BLOCK == 0
        return whole and (self.bits == 16 or self.group_size % quad_columns(self.bits) == 0)

    @property
    def size_bytes(self) -> int:
        """What one pass over it reads."""
        quantized = 0 if self.bits == 16 else self.scales.nbytes
        return self.words.nbytes + quantized + (0 if self.zeros is None else self.zeros.nbytes)


def _blocking(weight: Weight, n_rows: int, kernel: Kernel) -> Blocking:
    if _INTERPRETED:
        return Blocking(BLOCK, 64 if kernel == "matvec" else 2 * TILE_WORDS, 1)  # few programs
    return blocking_for(weight, n_rows, torch.cuda.get_device_capability(weight.words.device), kernel)


def matvec(
    x: Activations,
    weight: Weight,
    y: torch.Tensor,
    *,
    epilogue: Epilogue = "store",
    norm_weight: torch.Tensor | None = None,
    next_x: Activations | None = None,
    counters: torch.Tensor | None = None,
    blocking: Blocking | None = None,
    pdl: bool = False,
) -> None:
    """`y = x wᵀ` and the epilogue, in one launch; on tensor cores where the activations are bfloat16.

    y: (n_rows, out_features), half of the weight's for SwiGLU; float32 but for "store", where any float type does.
    norm_weight: of the norm behind "add_and_pack". next_x: what the packing fills. counters: out_features / BLOCK
    int32 zeros, which they are again afterwards. pdl: chained by programmatic dependent launch (compute
    capability 9.0).
    """
    n_rows, out_features = y.shape
    kernel: Kernel = "tiles" if x.rounding == "bfloat16" else "matvec"
    blocking = blocking or _blocking(weight, n_rows, kernel)
    n_sums = 0 if x.square_sums is None else x.square_sums.shape[1]
    filled = next_x or x
    placeholder = x.scales
    variant = _tile_constants if kernel == "tiles" else _matvec_constants
    (tile_kernel if kernel == "tiles" else matvec_kernel)[(triton.cdiv(out_features, blocking.outputs),)](
        x.elements if kernel == "tiles" else x.data,
        x.scales,
        placeholder if x.square_sums is None else x.square_sums,
        weight.words.view(torch.int16) if kernel == "tiles" else weight.words,
        weight.scales,
        placeholder if weight.zeros is None else weight.zeros,
        y,
        placeholder if norm_weight is None else norm_weight,
        filled.elements,
        filled.scales,
        placeholder if filled.square_sums is None else filled.square_sums,
        placeholder if counters is None else counters,
        n_rows,
        out_features,
        weight.words.shape[1],
        weight.scales.shape[1],
        0 if weight.bits == 16 else weight.group_size // quad_columns(weight.bits),
        n_sums,
        x.eps,
        BITS=weight.bits,
        ASYMMETRIC=weight.zeros is not None,
        EPILOGUE=epilogue,
        NEXT_BITS=filled.bits,
        NEXT_ROUNDING=filled.rounding,
        N_SUMS=triton.next_power_of_2(n_sums) if n_sums else 0,
        BLOCK_OUT=blocking.outputs,
        PTX=not _INTERPRETED,
        PDL=pdl,
        num_warps=blocking.warps,
        **variant(x, weight, n_rows, blocking),
        **({"launch_pdl": True} if pdl else {}),
    )


def _matvec_constants(x: Activations, weight: Weight, n_rows: int, blocking: Blocking) -> dict[str, object]:
    """What `matvec_kernel` is compiled for, beyond what both kernels are."""
    n_words = weight.words.shape[1]
    n_tiles = triton.cdiv(n_words, blocking.words)
    return {
        "ROUNDING": x.rounding,
        "PER_CHANNEL": weight.bits != 16 and weight.scales.shape[1] == 1,
        "ROWS": triton.next_power_of_2(n_rows),
        "BLOCK_WORDS": blocking.words,
        "N_TILES": n_tiles,
        "AHEAD": min(blocking.ahead, n_tiles),
        "EVEN": n_words % blocking.words == 0,
    }


def _tile_constants(x: Activations, weight: Weight, n_rows: int, blocking: Blocking) -> dict[str, object]:
    """The same for `tile_kernel`."""
    n_words, at_once = weight.words.shape[1], blocking.warps * TILE_WORDS
    is_wide = weight.group_size % (TILE_WORDS // 4 * quad_columns(weight.bits)) == 0
    return {
        "GROUPS": "channel" if weight.scales.shape[1] == 1 else "wide" if is_wide else "narrow",
        "ROWS": 8 if n_rows <= 8 else 16,
        "N_TILES": triton.cdiv(n_words, at_once),
        "DEPTH": blocking.words // at_once,
        "EVEN": n_words % blocking.words == 0,
        "WARPS": blocking.warps,
    }


@triton.jit
def _quad_sums(q, x, plane, mask, BITS: tl.constexpr, ROUNDING: tl.constexpr, PTX: tl.constexpr):
    """Each quad's weights times its activations: q (outputs, 1, words) int32 to (outputs, rows, quads) float32."""
    x0 = tl.load(x, mask=mask, other=0)
    if BITS == 4:
        x1 = tl.load(x + plane, mask=mask, other=0)
        if ROUNDING == "half":
            x2 = tl.load(x + 2 * plane, mask=mask, other=0)
            x3 = tl.load(x + 3 * plane, mask=mask, other=0)
            by_word = dot_int4_half(q, x0, x1, x2, x3, PTX)
        else:
            by_word = dot_int4_int8(q, x0, x1, PTX)
    else:
        if ROUNDING == "half":
            by_word = dot_int8_half(q, x0, tl.load(x + plane, mask=mask, other=0), PTX)
        else:
            by_word = dot_int8_int8(q, x0, PTX)
    quads = tl.reshape(by_word, [by_word.shape[0], by_word.shape[1], by_word.shape[2] // 4, 4])
    return tl.sum(quads, axis=3).to(tl.float32)


@triton.jit
def _weight_tile(
    weight,
    scales,
    zeros,
    weight_row,
    in_out,
    t,
    n_words,
    n_groups,
    quads_per_group,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Tile t of the rows `weight_row` (outputs, 1, 1): words (…, BLOCK_WORDS), and their quads' scales and zeros.

    Where a row has one scale, it is no part of the tile; its one zero is.
    """
    word = t * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, None, :]
    quads = t * (BLOCK_WORDS // 4) + tl.arange(0, BLOCK_WORDS // 4)[None, None, :]
    in_words = in_out if EVEN else in_out & (word < n_words)
    in_quads = in_out if EVEN else in_out & (quads < n_words // 4)
    at = weight + weight_row.to(tl.int64) * n_words + word
    q = tl.load(at, mask=in_words, other=0, eviction_policy="evict_first")
    scale, zero = q, q  # where there are none
    if BITS != 16:
        group = tl.max_contiguous(quads // quads_per_group, [1, 1, 2])  # no more than an order of the axes
        group = weight_row * n_groups + (0 if PER_CHANNEL else group)
        if not PER_CHANNEL:
            scale = tl.load(scales + group, mask=in_quads, other=0.0)
        if ASYMMETRIC:
            zero = tl.load(zeros + group, mask=in_quads, other=0)
    return q, scale, zero


@triton.jit(do_not_specialize_on_alignment=["x_scales", "scales", "zeros"])
def matvec_kernel(
    x,
    x_scales,
    sums,
    weight,
    scales,
    zeros,
    y,
    norm_weight,
    next_x,
    next_scales,
    next_sums,
    counters,
    n_rows,
    out_features,
    n_words,
    n_groups,
    quads_per_group,
    n_sums,
    eps,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    EPILOGUE: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    NEXT_ROUNDING: tl.constexpr,
    N_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    N_TILES: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y[m, o] = Σ_i x[m, i] w[o, i]` for BLOCK_OUT outputs o a program, then the epilogue.

    weight: (out_features, n_words) int32; of a dense one the words are its elements. For SwiGLU it has
    2 · out_features rows, the gate's first, and y is (n_rows, out_features). sums: what the product's RMSNorm
    needs, unless N_SUMS is 0. AHEAD tiles are on their way while one is multiplied, the first of them before the
    launch that makes x is over.
    """
    GATED: tl.constexpr = EPILOGUE == "swiglu_and_pack"
    OUTS: tl.constexpr = 2 * BLOCK_OUT if GATED else BLOCK_OUT
    QUADS: tl.constexpr = BLOCK_WORDS // 4
    PLANES: tl.constexpr = (2 if ROUNDING == "half" else 1) * (2 if BITS == 4 else 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, OUTS)
    out = tl.program_id(0) * BLOCK_OUT + (i // 2 if GATED else i)
    stored_row = out + i % 2 * out_features if GATED else out
    in_out = (out < out_features)[:, None, None]
    weight_row = stored_row[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    word = tl.arange(0, BLOCK_WORDS)[None, None, :]
    quad = tl.arange(0, QUADS)[None, None, :]
    n_quads = n_words // 4

    under_way = ()  # type: tuple[Any, ...]
    for t in tl.static_range(AHEAD):
        tile = _weight_tile(weight, scales, zeros, weight_row, in_out, t, n_words, n_groups, quads_per_group,
                            BITS, ASYMMETRIC, PER_CHANNEL, BLOCK_WORDS, EVEN)  # fmt: skip
        under_way = under_way + (tile,)  # noqa: RUF005  Triton does not unpack
    norm = norm_of(norm_weight, EPILOGUE, BLOCK_OUT)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if N_SUMS:  # loaded before the loop, whose length hides how long that takes; as is what y already holds
        squares = squares_of(sums, tl.arange(0, ROWS), n_rows, n_sums, N_SUMS)
        divisor = root_mean_square(squares, n_sums, eps)[None, :]
    before = before_sum(y, n_rows, out_features, EPILOGUE, ROWS, BLOCK_OUT)
    acc = tl.zeros([OUTS, ROWS, BLOCK_WORDS if BITS == 16 else QUADS], tl.float32)
    for t in tl.static_range(N_TILES):
        q, scale, zero = under_way[0]
        under_way = under_way[1:]
        if t + AHEAD < N_TILES:
            tile = _weight_tile(weight, scales, zeros, weight_row, in_out, t + AHEAD, n_words, n_groups,
                                quads_per_group, BITS, ASYMMETRIC, PER_CHANNEL, BLOCK_WORDS, EVEN)  # fmt: skip
            under_way = under_way + (tile,)  # noqa: RUF005
        mask = row < n_rows
        at = word + t * BLOCK_WORDS
        in_words = mask if EVEN else mask & (at < n_words)
        if BITS == 16:
            acc += q.to(tl.float32) * tl.load(x + row * n_words + at, mask=in_words, other=0.0)
        else:
            part = _quad_sums(q, x + row * (PLANES * n_words) + at, n_words, in_words, BITS, ROUNDING, PTX)
            quads = quad + t * QUADS
            in_quads = mask if EVEN else mask & (quads < n_quads)
            x_scale = x_scales + row * (2 * n_quads) + quads
            part *= tl.load(x_scale, mask=in_quads, other=0.0)
            offset = 0.0 if ROUNDING == "half" else (8.0 if BITS == 4 else 128.0)
            if ROUNDING == "int8" or ASYMMETRIC:
                x_sum = tl.load(x_scale + n_quads, mask=in_quads, other=0.0)
                if ASYMMETRIC:
                    offset += zero.to(tl.float32)
                part -= offset * x_sum
            if not PER_CHANNEL:
                part *= scale.to(tl.float32)
            acc += part
    total = tl.sum(acc, axis=2)  # (OUTS, ROWS)
    if PER_CHANNEL:
        total *= tl.load(scales + stored_row, mask=out < out_features, other=0.0).to(tl.float32)[:, None]
    if N_SUMS:
        total /= divisor
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [BLOCK_OUT, 2, ROWS]), [0, 2, 1]))
        total = gated(gate, up)
    finish(total, before, y, norm, next_x, next_scales, next_sums, counters, n_rows, out_features,
           EPILOGUE, NEXT_BITS, NEXT_ROUNDING, ROWS, BLOCK_OUT)  # fmt: skip
