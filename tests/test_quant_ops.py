"""The dequantizing matmuls are exact up to the rounding that their module states, for any shape and tiling."""

import subprocess
import sys

import pytest
import torch
from program import RESIDENT

import quant.ops
from quant.ops import dequantize, int4_matmul, int8_matmul
from quant.packing import pack_codes

MATMULS = {4: int4_matmul, 8: int8_matmul}
ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 7, 1), (5, 33, 1), (64, 96, 3), (33, 256, 2), (70, 130, 13)]
"""out_features, in_features, n_groups: odd sizes, one group and many."""


def stored(
    bits: int, shape: tuple[int, int, int], symmetric: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """qweight, scales and zeros of a random weight, and the weight itself by definition in float64."""
    out_features, in_features, n_groups = shape
    generator = torch.Generator().manual_seed(out_features)
    low, high = -(1 << bits - 1), 1 << bits - 1
    codes = torch.randint(low, high, (out_features, in_features), generator=generator).to(torch.int8)
    scales = (torch.rand((out_features, n_groups), generator=generator) - 0.3).to(dtype)
    zeros = torch.randint(low, high, scales.shape, generator=generator).to(torch.int8)
    group_of = torch.arange(in_features) // (in_features // n_groups)
    shift = 0 if symmetric else zeros.double()[:, group_of]
    w = (codes.double() - shift) * scales.double()[:, group_of]
    return pack_codes(codes, bits).view(torch.uint8), scales, None if symmetric else zeros, w


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_is_within_the_stated_bound(
    bits: int, shape: tuple[int, int, int], symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qweight, scales, zeros, w = stored(bits, shape, symmetric)
    x = torch.randn((2, 3, shape[1]), generator=torch.Generator().manual_seed(1))
    for dtype, roundoff in ROUNDOFF.items():
        exact_x = x.to(dtype).double()
        exact, magnitude = exact_x @ w.T, exact_x.abs() @ w.abs().T
        bound = (shape[1] + 1) * 2.0**-24 * magnitude + roundoff * exact.abs()
        for tile_weights in (1, 5 * shape[1], quant.ops.TILE_WEIGHTS):
            monkeypatch.setattr(quant.ops, "TILE_WEIGHTS", tile_weights)
            y = MATMULS[bits](x.to(dtype), qweight, scales, zeros)
            assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
            assert ((y.double() - exact).abs() <= 1.001 * bound).all()  # the bound is to first order


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_weights_are_exact_for_half_scales_and_rounded_once_for_float32(
    bits: int, shape: tuple[int, int, int], symmetric: bool
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        qweight, scales, zeros, w = stored(bits, shape, symmetric, dtype)
        assert torch.equal(dequantize(qweight, scales, zeros, shape[1], bits), w.float())
        assert dtype == torch.float32 or torch.equal(w.float().double(), w)


MEMORY = f"""{RESIDENT}
import torch
from quant.ops import int4_matmul
torch.set_num_threads(1)
qweight = torch.zeros((16384, 4096), dtype=torch.uint8)
scales, x = torch.ones((16384, 64)), torch.ones((1, 8192))
int4_matmul(torch.ones((1, 256)), qweight[:8, :128], scales[:8, :2], None)
before = resident_bytes("VmHWM")
int4_matmul(x, qweight, scales, None)
print(resident_bytes("VmHWM") - before)
"""


def test_a_matmul_takes_a_tile_beyond_the_packed_weight() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    tile_bytes = quant.ops.TILE_WEIGHTS * (4 + 3)  # float32, and the codes of a tile while it is unpacked
    weight_bytes = 16384 * 4096  # read from zero pages until then
    assert int(done.stdout) < weight_bytes + tile_bytes + 8e6  # dense it would be 536 MB
