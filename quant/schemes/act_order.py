"""Columns whose groups lie scattered ("act-order"): they are put side by side at load, and inputs come in their order.

A g_idx says of each column which group it is in. Sorted by it, a weight has groups of consecutive columns, as kernels
know them, and multiplies inputs that were picked in the same order: a copy of the inputs for each product, and no
copy of the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quant.errors import IntegrityError
from quant.packing import pack_codes, unpack_codes
from quant.schemes.affine import Affine, AffineLinear
from quant.tiles import map_tiles

TILE_WEIGHTS = 1 << 21
"""Weights reordered at once in a thread, a byte each."""


def columns_by_group(g_idx: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """The columns in the order of their groups, int64; None where they lie so already.

    g_idx: (in_features,), on the CPU. Every group has `group_size` columns, but the last may have fewer.

    Raises:
        IntegrityError: it names a group that there is not, or a group of another size.
    """
    if g_idx.dtype not in (torch.int32, torch.int64):
        raise IntegrityError(f"g_idx is stored as {g_idx.dtype}, not as {torch.int32}")
    in_order = torch.arange(len(g_idx), dtype=g_idx.dtype) // group_size
    if torch.equal(g_idx, in_order):
        return None
    n_groups = int(in_order[-1]) + 1
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= n_groups:
        wrong = lowest if lowest < 0 else highest
        raise IntegrityError(f"g_idx puts a column into group {wrong} of {n_groups}")
    columns = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[columns], in_order):
        raise IntegrityError(f"g_idx does not make groups of {group_size} columns")
    return columns


def with_columns(packed: torch.Tensor, columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed codes (rows, words) with their columns in another order; `columns` has all of them."""
    reordered = torch.empty_like(packed)

    def reorder(rows: slice) -> None:
        codes = unpack_codes(packed[rows], bits, len(columns))
        reordered[rows] = pack_codes(codes.index_select(1, columns), bits)

    map_tiles(reorder, len(packed), max(1, TILE_WEIGHTS // len(columns)))
    return reordered


@dataclass(frozen=True)
class ActOrder:
    """compressed-tensors' groups in act-order, as it wrote them until 0.19: those of `affine`, and a weight_g_idx."""

    affine: Affine

    def linear(self, in_features: int, out_features: int) -> "ActOrderLinear":
        """An empty layer; IntegrityError where the groups do not divide in_features."""
        self.affine.linear(in_features, out_features)
        return ActOrderLinear(self.affine, in_features, out_features)


class ActOrderLinear(AffineLinear):
    kept = frozenset()  # its words may be put in another order

    def stored(self) -> dict[str, tuple[int, ...]]:
        return super().stored() | {"weight_g_idx": (self.in_features,)}

    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        super().load_stored(tensors, device)
        columns = columns_by_group(tensors["weight_g_idx"], self.scheme.group_size or self.in_features)
        if columns is not None:
            columns = columns.to(device)
            packed = with_columns(self.qweight.view(torch.int32), columns, self.scheme.bits)
            self.take(packed, self.scales, self.zeros, columns)
