"""AWQ's stored form (Lin et al. 2023) in AutoAWQ's `gemm` layout, as an int4 layer of our own.

`w[o, i] = (u[i, o] − z[g, o]) · scales[g, o]` with g the group of column i, u and z unsigned. Stored transposed, packed
along the outputs, eight of which are interleaved in a word: docs/format.md has the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quant.errors import IntegrityError
from quant.schemes.affine import Affine, AffineLinear
from quant.schemes.gptq import check_dtypes
from quant.tiles import map_tiles

BITS = 4
_PER_WORD = 8
_OUTPUTS = ((0, 4, 1, 5), (2, 6, 3, 7))
"""Which of its eight outputs the bytes of a word have in their low nibbles, and in their high ones."""
_LOW, _HIGH = 0x0F0F0F0F, -0x0F0F0F10
"""Masks for the nibbles of an int32."""

TILE_WEIGHTS = 1 << 20
"""Weights repacked at once in a thread, half a byte each."""


@dataclass(frozen=True)
class Awq:
    """`group_size`: None for whole rows."""

    group_size: int | None

    def linear(self, in_features: int, out_features: int) -> "AwqLinear":
        """An empty layer; IntegrityError where groups or words do not divide the weight."""
        Affine(BITS, self.group_size, symmetric=False).linear(in_features, out_features)
        if out_features % _PER_WORD or in_features % _PER_WORD:
            raise IntegrityError(
                f"a weight of {out_features} × {in_features} has no whole words of {_PER_WORD} codes"
            )
        return AwqLinear(Affine(BITS, self.group_size, symmetric=False), in_features, out_features)


class AwqLinear(AffineLinear):
    kept = frozenset()  # all are put in another order

    def stored(self) -> dict[str, tuple[int, ...]]:
        n_words = self.out_features // _PER_WORD
        n_groups = self.in_features // (self.scheme.group_size or self.in_features)
        return {
            "qweight": (self.in_features, n_words),
            "qzeros": (n_groups, n_words),
            "scales": (n_groups, self.out_features),
        }

    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        check_dtypes(tensors)
        packed = _repacked(tensors["qweight"].to(device))
        zeros = _zeros(tensors["qzeros"].to(device))
        self.take(packed, tensors["scales"].to(device).T.contiguous(), zeros)


def _repacked(qweight: torch.Tensor) -> torch.Tensor:
    """(in_features, out_features / 8) int32 to our words (out_features, in_features / 8)."""
    in_features, n_words = qweight.shape
    transposed = (
        qweight.T.contiguous()
    )  # at once: a tile's part of it would come from all of the memory's pages
    packed = qweight.new_empty(n_words, _PER_WORD, in_features // _PER_WORD)

    def repack(words: slice) -> None:
        _pair_columns(transposed[words], packed[words].view(torch.uint8))

    map_tiles(repack, n_words, max(1, TILE_WEIGHTS // in_features // _PER_WORD))
    return packed.flatten(0, 1)


def _pair_columns(words: torch.Tensor, pairs: torch.Tensor) -> None:
    """Words (m, n) of a column each to bytes (m, 8, n / 2): two columns of an output, the first in the low nibble."""
    first, second = words[:, 0::2], words[:, 1::2]
    low = first & _LOW | (second & _LOW) << 4
    high = first >> 4 & _LOW | second & _HIGH
    for outputs, nibbles in zip(_OUTPUTS, (low, high), strict=True):
        by_byte = nibbles.view(torch.uint8).view(*first.shape, 4)
        for byte, output in enumerate(outputs):
            pairs[:, output] = by_byte[:, :, byte]


def _zeros(qzeros: torch.Tensor) -> torch.Tensor:
    """(n_groups, out_features / 8) int32 to signed zero points (out_features, n_groups) int8."""
    n_groups, n_words = qzeros.shape
    words = pad(qzeros, (0, 0, 0, n_groups % 2)).T.contiguous()
    pairs = words.new_empty(n_words, _PER_WORD, words.shape[1] // 2, dtype=torch.uint8)
    _pair_columns(words, pairs)
    unsigned = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(2).flatten(0, 1)[:, :n_groups]
    return (unsigned - 8).view(torch.int8)
