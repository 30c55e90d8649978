"""Activations in the form that the matmuls for few rows take them, so that weights stay as they are stored.

A word of 32 bits holds 8 weights of 4 bits, or 4 of 8 bits, in their natural order. Four words, which a thread reads
at once, are a quad: 32 or 16 columns. The activations that meet a word come in planes, each a word of 4 int8 or of
2 float16 for every word of the weight, arranged so that unpacking the weight needs no shuffle:

    weights  activations   planes   plane p of a word with the columns 0, 1, … has
    4 bits   int8          2        columns p, p + 2, p + 4, p + 6
    4 bits   half          4        columns p, p + 4
    4 bits   bfloat16      4        columns p, p + 4
    8 bits   int8          1        columns 0 … 3
    8 bits   half          2        columns 2p, 2p + 1
    8 bits   bfloat16      2        columns p, p + 2

int8 and half are for a few rows. They are normalized by quads: to 127 for int8; to 1 for half, so that no sum of
products leaves float16's range whatever the model's outliers. A quad has a scale and, for the zero points, its scaled
sum: `Σ x = sum`. bfloat16 is for tensor cores, which sum in float32 more columns than a quad has: it needs no scale.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl

Rounding = Literal["plain", "int8", "half", "bfloat16"]
"""How activations are rounded: not at all (float32, for dense weights), by quads to 8 bits or to float16, or each for
itself to bfloat16."""

TENSOR_CORE_ROWS = 4
"""From so many rows on tensor cores multiply quantized weights, where a card has them: a matvec's time grows with the
rows from there."""

BLOCK = 32
"""Columns that are packed together: one or two quads."""


@dataclass(frozen=True)
class Activations:
    """`n_rows` rows for a weight of `bits` bits (16 is dense).

    data: (n_rows, planes · words) int32, or (n_rows, in_features) float32 where `rounding` is plain. scales:
    (n_rows, 2, n_quads) float32, scale and scaled sum of each quad; none for bfloat16. square_sums:
    (n_rows, in_features / BLOCK) float32 where the rows are still to be divided by their root mean square,
    `sqrt(Σ square_sums / in_features + eps)`.
    """

    data: torch.Tensor
    scales: torch.Tensor
    in_features: int
    bits: int
    rounding: Rounding
    square_sums: torch.Tensor | None = None
    eps: float = 0.0

    @staticmethod
    def empty(
        n_rows: int, in_features: int, bits: int, rounding: Rounding, device: torch.device | str
    ) -> "Activations":
        """Room for activations; `rounding` must be plain where the weight is dense, and only there.

        It is that of a few rows: those that tensor cores multiply become bfloat16, which for int4 is more exact than
        int8, and for int8 adds some percent to the error of the weights.
        """
        assert (rounding == "plain") == (bits == 16), f"{rounding} activations for weights of {bits} bits"
        assert in_features % BLOCK == 0, f"{in_features} in_features are no multiple of {BLOCK}"
        if bits != 16 and n_rows >= TENSOR_CORE_ROWS and has_tensor_cores(torch.device(device)):
            rounding = "bfloat16"
        n_quads = 0 if rounding == "bfloat16" else in_features // quad_columns(bits)
        scales = torch.empty(n_rows, 2, n_quads, device=device)
        n_bytes = in_features * {"int8": 1, "half": 2, "bfloat16": 2, "plain": 4}[rounding]
        dtype = torch.float32 if rounding == "plain" else torch.int32
        data = torch.empty(n_rows, n_bytes // 4, dtype=dtype, device=device)
        return Activations(data, scales, in_features, bits, rounding)

    @staticmethod
    def plain(data: torch.Tensor) -> "Activations":
        """`data` (n_rows, in_features) float32 as they are."""
        return Activations(data, data, data.shape[1], 16, "plain")

    def before_norm(self, eps: float) -> "Activations":
        """The same with room for sums of squares: what `add_and_pack` fills."""
        square_sums = self.scales.new_empty((len(self.data), self.in_features // BLOCK))
        return replace(self, square_sums=square_sums, eps=eps)

    @property
    def elements(self) -> torch.Tensor:
        """`data` by elements: int8, float16, bfloat16 or float32."""
        dtypes = {
            "plain": torch.float32,
            "int8": torch.int8,
            "half": torch.float16,
            "bfloat16": torch.bfloat16,
        }
        return self.data.view(dtypes[self.rounding])


def quad_columns(bits: int) -> int:
    """Columns of four words."""
    return 128 // min(bits, 8)


def has_tensor_cores(device: torch.device) -> bool:
    """Whether products of bfloat16 run on tensor cores (from compute capability 8.0 on), or are interpreted."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def _place(columns, in_features, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """Where in a row the element of each column stands."""
    if ROUNDING == "plain":
        place = columns
    elif ROUNDING == "int8":
        place = columns
        if BITS == 4:
            place = columns % 2 * (in_features // 2) + columns // 8 * 4 + columns % 8 // 2
    else:
        if BITS == 4:
            place = (columns % 4) * (in_features // 4) + columns // 8 * 2 + columns % 8 // 4
        elif ROUNDING == "bfloat16":
            place = columns % 2 * (in_features // 2) + columns // 2
        else:
            place = columns % 4 // 2 * (in_features // 2) + columns // 4 * 2 + columns % 2
    return place


@triton.jit
def pack(
    values,
    rows,
    in_rows,
    first_column,
    x,
    x_scales,
    in_features,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store `values` (ROWS, COLUMNS) float32 in the rows `rows` (ROWS,), from the columns `first_column` (ROWS,) on.

    `x` points to `Activations.elements`, `x_scales` to its scales. COLUMNS and first_column are multiples of BLOCK.
    A value that is not finite stays so, or makes its quad's scaled sum NaN: it does not get lost.
    """
    columns = first_column[:, None] + tl.arange(0, COLUMNS)[None, :]
    mask = in_rows[:, None]
    if ROUNDING == "int8" or ROUNDING == "half":
        QUAD: tl.constexpr = 128 // BITS
        quads = tl.reshape(values, [ROWS, COLUMNS // QUAD, QUAD])
        largest = tl.max(tl.abs(quads), axis=2)
        top: tl.constexpr = 127.0 if ROUNDING == "int8" else 1.0
        to_unit = tl.where(largest > 1e-30, top / largest, 0.0)  # below 4e-37 it would be infinite
        quads = quads * to_unit[:, :, None]
        quads = tl.floor(quads + 0.5) if ROUNDING == "int8" else quads.to(tl.float16).to(tl.float32)
        scale = largest / top
        quad = first_column[:, None] // QUAD + tl.arange(0, COLUMNS // QUAD)[None, :]
        at = x_scales + rows[:, None] * (2 * (in_features // QUAD)) + quad
        tl.store(at, scale, mask=mask)
        tl.store(at + in_features // QUAD, tl.sum(quads, axis=2) * scale, mask=mask)
        values = tl.reshape(quads, [ROWS, COLUMNS])
    place = _place(columns, in_features, BITS, ROUNDING)
    tl.store(x + rows[:, None] * in_features + place, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _pack_kernel(
    source, x, x_scales, in_features, BITS: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    values = tl.load(source + row * in_features + first + tl.arange(0, BLOCK)).to(tl.float32)
    rows = row + tl.zeros([1], tl.int64)
    pack(
        values[None, :],
        rows,
        rows >= 0,
        first + tl.zeros([1], tl.int32),
        x,
        x_scales,
        in_features,
        BITS,
        ROUNDING,
        1,
        BLOCK,
    )


def packed(x: torch.Tensor, bits: int, rounding: Rounding) -> Activations:
    """`x` (n_rows, in_features), contiguous, of any float dtype, for weights of `bits` bits."""
    n_rows, in_features = x.shape
    made = Activations.empty(n_rows, in_features, bits, rounding, x.device)
    _pack_kernel[(n_rows, in_features // BLOCK)](
        x,
        made.elements,
        made.scales,
        in_features,
        BITS=bits,
        ROUNDING=made.rounding,
        BLOCK=BLOCK,
        num_warps=1,
    )
    return made
