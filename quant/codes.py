"""What a method chooses for a weight: the codes, and the scales and zero points that give them values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Codes:
    """`w ≈ (codes − zeros) · scales`.

    codes: (rows, in_features) int8. scales: (rows, n_groups). zeros: (rows, n_groups) int8; None for all 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def dequantized(self) -> torch.Tensor:
        """The weight that they stand for, (rows, in_features) float32."""
        rows, n_groups = self.scales.shape
        groups = self.codes.view(rows, n_groups, -1).float()
        if self.zeros is not None:
            groups = groups - self.zeros.unsqueeze(-1).float()
        return (groups * self.scales.unsqueeze(-1).float()).flatten(1)

    def cpu(self) -> "Codes":
        zeros = None if self.zeros is None else self.zeros.cpu()
        return Codes(self.codes.cpu(), self.scales.cpu(), zeros)


def joined(tiles: Sequence[Codes]) -> Codes:
    """The codes of several tiles of rows, one below the other."""
    zeros = [tile.zeros for tile in tiles if tile.zeros is not None]
    return Codes(
        torch.cat([tile.codes for tile in tiles]),
        torch.cat([tile.scales for tile in tiles]),
        torch.cat(zeros) if zeros else None,
    )
