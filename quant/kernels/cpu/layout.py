"""How the CPU's kernels keep int4 and int8 weights: sixteen rows side by side, each unit behind its scales.

A unit is 16 rows of 32, 64 or 128 columns that share their rows' scales; a weight whose groups are larger (or whole
rows) has units that repeat them. A unit is a run of 32-bit words:

    16 scales in the type they are stored in      8 words, or 16 for float32
    16 zero points int8, where there are any      4 words
    the stored words, transposed                  word j of rows 0 … 15, for every j

A stored word is 8 columns of 4 bits or 4 of 8. So making the layout moves words and looks into none; it loses nothing,
and a vector of words is a row to a lane: products never need to be summed across lanes. Kernels stream a
block of 16 rows from one end to the other. Against what is stored it adds rows up to the next multiple of 16, and
where scales are repeated 1.6 % for int8 and 3 % for int4 (with units of 128 columns).
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quant.huge_pages import Arena
from quant.tiles import map_tiles

ROWS = 16
"""Rows of a block: the lanes of an AVX-512 register."""

UNITS = (128, 64, 32)
"""Columns of a unit. Larger ones take less memory and time for scales."""

_ARENA = Arena()

_WORD_BYTES = 4
_TILE_WORDS = 1 << 20
"""Words moved at once in a thread."""


@dataclass(frozen=True)
class Interleaved:
    """A weight in this layout. words: (n_blocks, n_units, words_per_unit) int32, contiguous.

    group_size: the columns that share a scale in what was stored, a multiple of `unit`.
    """

    words: torch.Tensor
    out_features: int
    in_features: int
    bits: int
    unit: int
    group_size: int
    scale_dtype: torch.dtype
    asymmetric: bool

    @property
    def n_blocks(self) -> int:
        return self.words.shape[0]

    @property
    def n_units(self) -> int:
        return self.words.shape[1]

    @property
    def x_unit(self) -> int:
        """The columns of activations that share a scale when they are rounded.

        For 4 bits 32, whatever the weight's are: with 64 and 128 int8 activations would raise SmolLM2's perplexity by
        0.6 %, with 32 by 0.4 % (`docs/log.md`), and 512 rows be 6 % faster.
        """
        return min(UNITS) if self.bits == 4 else self.unit

    @property
    def n_x_units(self) -> int:
        return self.in_features // self.x_unit

    @property
    def size_bytes(self) -> int:
        return self.words.nbytes


def unit_of(in_features: int, group_size: int) -> int | None:
    """The columns of a unit: the most that divide a group. None where nothing does: the kernels do not know it."""
    if in_features % group_size:
        return None
    return next((unit for unit in UNITS if group_size % unit == 0), None)


def interleave(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, in_features: int, bits: int
) -> Interleaved | None:
    """The layout of a weight as `quant.ops.int4_matmul` takes it, in new memory, by as many threads as torch has.

    None where its shape is one for the reference: a group of columns is no multiple of 32, or scales are not
    float16, bfloat16 or float32.
    """
    out_features, n_groups = scales.shape
    unit = unit_of(in_features, in_features // n_groups)
    if unit is None or scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    n_units, n_blocks = in_features // unit, -(-out_features // ROWS)
    header = header_words(scales.dtype, zeros is not None)
    unit_words = header + ROWS * unit * bits // 32
    words = _ARENA.empty(n_blocks, n_units, unit_words, dtype=torch.int32)
    weight = Interleaved(
        words, out_features, in_features, bits, unit, in_features // n_groups, scales.dtype, zeros is not None
    )

    def move(blocks: slice) -> None:
        rows = slice(blocks.start * ROWS, blocks.stop * ROWS)
        codes, part_scales, part_zeros = _parts(words[blocks], weight)
        moved = _by_blocks(qweight[rows].view(torch.int32)[:, : in_features * bits // 32])
        codes.copy_(moved.unflatten(2, (n_units, -1)).permute(0, 2, 3, 1))
        part_scales.copy_(_repeated(_by_blocks(scales[rows]), n_units).mT)
        if zeros is not None and part_zeros is not None:
            part_zeros.copy_(_repeated(_by_blocks(zeros[rows]), n_units).mT)

    map_tiles(move, n_blocks, max(1, _TILE_WORDS // (n_units * unit_words)))
    return weight


def restored(
    weight: Interleaved, start: int = 0, stop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """qweight, scales and zeros of the rows from `start` to `stop`, as they were before `interleave`."""
    stop = weight.out_features if stop is None else stop
    first = start // ROWS
    codes, scales, zeros = _parts(weight.words[first : -(-stop // ROWS)], weight)
    rows = slice(start - first * ROWS, stop - first * ROWS)
    once = slice(None, None, weight.group_size // weight.unit)  # of units that repeat a group's scales
    qweight = codes.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[rows].contiguous().view(torch.uint8)
    scales = scales[:, once].mT.flatten(0, 1)[rows]
    return qweight, scales, None if zeros is None else zeros[:, once].mT.flatten(0, 1)[rows]


def header_words(scale_dtype: torch.dtype, asymmetric: bool) -> int:
    """Words of a unit in front of its codes."""
    n_bytes: int = ROWS * (scale_dtype.itemsize + asymmetric)
    return n_bytes // _WORD_BYTES


def _parts(
    words: torch.Tensor, weight: Interleaved
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Views of some blocks: codes (blocks, units, words of a row, 16), scales and zeros (blocks, units, 16)."""
    n_scale_words = header_words(weight.scale_dtype, asymmetric=False)
    n_header = header_words(weight.scale_dtype, weight.asymmetric)
    scales = words[:, :, :n_scale_words].view(weight.scale_dtype)
    zeros = words[:, :, n_scale_words:n_header].view(torch.int8) if weight.asymmetric else None
    return words[:, :, n_header:].unflatten(2, (-1, ROWS)), scales, zeros


def _by_blocks(rows: torch.Tensor) -> torch.Tensor:
    """(rows, n) to (blocks, 16, n), filled up with zeros: rows whose scale is 0."""
    padded: torch.Tensor = pad(rows, (0, 0, 0, -len(rows) % ROWS))
    return padded.reshape(-1, ROWS, rows.shape[1])


def _repeated(groups: torch.Tensor, n_units: int) -> torch.Tensor:
    """(blocks, 16, groups) to (blocks, 16, units)."""
    repeated: torch.Tensor = groups.repeat_interleave(n_units // groups.shape[2], dim=2)
    return repeated
