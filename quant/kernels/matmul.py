"""The int4 and int8 matmuls on CUDA: by `matvec` for few rows, else dequantized into tiles for cuBLAS."""

import torch
import torch.nn.functional as F

from quant import ops
from quant.kernels.activations import Rounding, packed
from quant.kernels.ahead import dequantized_tiles
from quant.kernels.matvec import MOST_ROWS, Weight, matvec

ROUNDINGS: dict[int, Rounding] = {4: "int8", 8: "half", 16: "plain"}
"""How activations are rounded for few rows, by the bits of the weight (16: dense): to int8 only where that adds
less than a tenth of the error that the weights' own rounding has."""


def int4_matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """Stands in for `quant.ops.int4_matmul`, whose contract it keeps."""
    return _matmul(x, qweight, scales, zeros, 4)


def int8_matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """Stands in for `quant.ops.int8_matmul`, whose contract it keeps."""
    return _matmul(x, qweight, scales, zeros, 8)


def _matmul(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    weight = Weight.quantized(qweight, scales, zeros, bits)
    if not weight.supported or weight.in_features != x.shape[-1]:
        reference = ops.int4_matmul if bits == 4 else ops.int8_matmul
        return reference.reference(x, qweight, scales, zeros)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(*x.shape[:-1], weight.out_features)
    if len(rows) > MOST_ROWS:
        _matmul_in_tiles(rows, weight, y.view(len(rows), -1))
    elif len(rows):
        matvec(packed(rows, bits, ROUNDINGS[bits]), weight, y.view(len(rows), -1))
    return y


def _matmul_in_tiles(x: torch.Tensor, weight: Weight, y: torch.Tensor) -> None:
    """Dequantize as many rows of the weight as a tile holds, multiply, and go on."""
    for start, tile in dequantized_tiles(weight, x.dtype):
        if len(tile) == weight.out_features:
            torch.matmul(x, tile.T, out=y)
        else:
            y[:, start : start + len(tile)] = F.linear(x, tile)
