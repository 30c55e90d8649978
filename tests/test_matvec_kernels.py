"""The matmul kernels of quant.kernels, against plain PyTorch: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from quant import ops
from quant.kernels import matmul
from quant.kernels.activations import Activations, Rounding, packed
from quant.kernels.blockings import Blocking
from quant.kernels.matvec import Weight, matvec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
BOUND = {"int8": 1e-2, "half": 6e-4, "plain": 1e-6}
"""Relative errors in norm of one product: half a step of 127 by the largest of 32 normal values (2.1 times their root
mean square) is 0.5 %; a float16 rounds to 2⁻¹¹ and a chain of four products a little more."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def quantized(
    generator: torch.Generator,
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Weight:
    shape = (out_features, in_features // (group_size or in_features))
    qweight = torch.randint(
        0, 256, (out_features, in_features * bits // 8), generator=generator, dtype=torch.uint8
    )
    scales = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)
    zeros = (
        None if symmetric else torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8).to(DEVICE)
    )
    return Weight.quantized(qweight.to(DEVICE), scales.to(DEVICE), zeros, bits)


def dense_of(weight: Weight) -> torch.Tensor:
    if weight.bits == 16:
        return weight.words.float()
    codes = weight.words.view(torch.uint8)
    return ops.dequantize(codes, weight.scales, weight.zeros, weight.in_features, weight.bits)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def rows(generator: torch.Generator, n_rows: int, width: int) -> torch.Tensor:
    return torch.randn(n_rows, width, generator=generator).to(DEVICE)


@pytest.mark.parametrize("rounding", ["int8", "half"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "in_features"), [(32, 64), (32, 224), (64, 192), (128, 256), (None, 96)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_product_is_as_exact_as_its_activations(
    generator: torch.Generator,
    rounding: Rounding,
    bits: int,
    group_size: int | None,
    in_features: int,
    symmetric: bool,
) -> None:
    weight = quantized(
        generator,
        32,
        in_features,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        dtype=torch.bfloat16,
    )
    x = rows(generator, 3, in_features)
    y = torch.empty(3, 32, device=DEVICE)
    matvec(packed(x, bits, rounding), weight, y, blocking=Blocking(16, 64, 1))
    assert error(y, x @ dense_of(weight).T) < BOUND[rounding]


@pytest.mark.parametrize("n_rows", [1, 7, 16])
@pytest.mark.parametrize("blocking", [Blocking(2, 32, 1), Blocking(8, 64, 2), Blocking(32, 128, 4)])
def test_no_blocking_changes_a_product(generator: torch.Generator, n_rows: int, blocking: Blocking) -> None:
    weight = quantized(generator, 32, 288)  # 36 words, which no tile divides
    x = rows(generator, n_rows, 288)
    y = torch.full((n_rows, 32), torch.nan, device=DEVICE)
    matvec(packed(x, 4, "half"), weight, y, blocking=blocking)
    assert error(y, x @ dense_of(weight).T) < BOUND["half"]


@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_activations_stay_finite_and_exact(generator: torch.Generator, bits: int) -> None:
    weight = quantized(generator, 32, 128, bits=bits)
    for scale in (1e-30, 60_000.0, 1e30):
        x = rows(generator, 1, 128) * scale
        y = torch.empty(1, 32, device=DEVICE)
        matvec(packed(x, bits, "half"), weight, y)
        assert error(y.double(), x.double() @ dense_of(weight).double().T) < BOUND["half"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounding", ["int8", "half"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_get_lost(
    generator: torch.Generator, bits: int, rounding: Rounding, value: float
) -> None:
    weight = quantized(generator, 32, 64, bits=bits, symmetric=False)
    x = rows(generator, 1, 64)
    x[0, 40] = value
    y = torch.empty(1, 32, device=DEVICE)
    matvec(packed(x, bits, rounding), weight, y)
    assert not y.isfinite().any()


def test_zeros_give_zeros(generator: torch.Generator) -> None:
    weight = quantized(generator, 32, 64, symmetric=False)
    y = torch.full((1, 32), torch.nan, device=DEVICE)
    matvec(packed(torch.zeros(1, 64, device=DEVICE), 4, "int8"), weight, y)
    assert torch.equal(y, torch.zeros_like(y))


CHAINS = [(4, 4, 1, 4), (8, 4, 3, 2), (4, 8, 2, 8), (16, 4, 3, 4), (4, 16, 1, 4)]


@pytest.mark.parametrize(("bits", "next_bits", "n_rows", "outputs"), CHAINS)
def test_a_chain_of_products_is_residual_norm_and_swiglu(
    generator: torch.Generator, bits: int, next_bits: int, n_rows: int, outputs: int
) -> None:
    dim, hidden_dim, blocking = 64, 96, Blocking(outputs, 32, 1)

    def weight(bits: int, out_features: int, in_features: int) -> Weight:
        if bits == 16:
            return Weight.dense(rows(generator, out_features, in_features).bfloat16())
        return quantized(generator, out_features, in_features, bits=bits)

    def rounding(bits: int) -> Rounding:
        return "plain" if bits == 16 else "half"

    first, gate_up, last = (
        weight(bits, dim, 96),
        weight(next_bits, 2 * hidden_dim, dim),
        weight(next_bits, dim, hidden_dim),
    )
    x, h = rows(generator, n_rows, 96), rows(generator, n_rows, dim)
    norm_weight = rows(generator, 1, dim)[0]
    counters = torch.zeros(hidden_dim // 32, dtype=torch.int32, device=DEVICE)
    stream, hidden, y = h.clone(), torch.empty(n_rows, hidden_dim, device=DEVICE), torch.empty_like(h)
    normed = Activations.empty(n_rows, dim, next_bits, rounding(next_bits), DEVICE).before_norm(EPS)
    gated = Activations.empty(n_rows, hidden_dim, next_bits, rounding(next_bits), DEVICE)
    common = {"counters": counters, "blocking": blocking}
    matvec(packed(x, bits, rounding(bits)), first, stream, epilogue="add_and_pack", norm_weight=norm_weight,
           next_x=normed, **common)  # fmt: skip
    matvec(normed, gate_up, hidden, epilogue="swiglu_and_pack", next_x=gated, **common)
    matvec(gated, last, y, blocking=blocking)

    expected_stream = h + x @ dense_of(first).T
    expected_normed = F.rms_norm(expected_stream, (dim,), norm_weight, EPS)
    gate, up = (expected_normed @ dense_of(gate_up).T).chunk(2, dim=-1)
    expected_hidden = F.silu(gate) * up
    assert error(stream, expected_stream) < BOUND["half"]
    assert error(hidden, expected_hidden) < 4 * BOUND["half"]
    assert error(y, expected_hidden @ dense_of(last).T) < 4 * BOUND["half"]
    assert not counters.any(), "the counters are left as they were found"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("name", "group_size", "in_features"),
    [("int4", 32, 160), ("int8", 32, 160), ("int4", None, 96), ("int8", 128, 128), ("int4", 8, 72)],
)
def test_many_rows_keep_the_contract_of_the_op(
    generator: torch.Generator,
    dtype: torch.dtype,
    symmetric: bool,
    name: str,
    group_size: int | None,
    in_features: int,
) -> None:
    bits = int(name[3:])
    weight = quantized(
        generator,
        64,
        in_features,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        dtype=torch.bfloat16,
    )
    kernel, op = getattr(matmul, f"{name}_matmul"), getattr(ops, f"{name}_matmul")
    x = rows(generator, 40, in_features).to(dtype).view(2, 20, in_features)
    tensors = (weight.words.view(torch.uint8), weight.scales, weight.zeros)
    y, expected = kernel(x, *tensors), op.reference(x, *tensors)
    assert y.dtype == dtype and y.shape == expected.shape
    # The kernel rounds the dequantized weight to x's type and the reference does not: one unit roundoff more.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert error(y.float(), expected.float()) < tolerance


def test_few_rows_and_no_rows_keep_the_contract_of_the_op(generator: torch.Generator) -> None:
    weight = quantized(generator, 64, 64, bits=8)
    tensors = (weight.words.view(torch.uint8), weight.scales, weight.zeros)
    for n_rows in (0, 1, 16):
        x = rows(generator, n_rows, 64).bfloat16()
        y, expected = matmul.int8_matmul(x, *tensors), ops.int8_matmul.reference(x, *tensors)
        assert y.shape == expected.shape and y.dtype == x.dtype
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2e-2)


def test_a_weight_larger_than_the_tile_is_multiplied_in_parts(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "TILE_BYTES", 64 * 4 * 24)
    weight = quantized(generator, 64, 64)
    x = rows(generator, 17, 64)
    y = matmul.int4_matmul(x, weight.words.view(torch.uint8), weight.scales, None)
    assert error(y, x @ dense_of(weight).T) < 1e-6
