"""The matmul kernels of quant.kernels, against plain PyTorch: interpreted on the CPU, compiled where there is a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from quant import ops
from quant.kernels import activations, ahead, matmul
from quant.kernels.activations import Activations, Rounding, packed
from quant.kernels.blockings import Blocking
from quant.kernels.dequantize import dequantize
from quant.kernels.matvec import Weight, matvec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
BOUND = {"int8": 1e-2, "half": 6e-4, "bfloat16": 2**-8 if DEVICE == "cuda" else 2**-7, "plain": 1e-6}
"""Relative errors in norm of one product: half a step of 127 by the largest of 32 normal values (2.1 times their root
mean square) is 0.5 %; a float16 rounds to 2⁻¹¹ and a chain of four products a little more. A bfloat16 rounds to 2⁻⁸,
which is 2⁻⁸ / √3 in the mean; activations do, and narrow groups' scales and weights. The interpreter cuts off."""


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
@pytest.mark.parametrize("blocking", [Blocking(2, 32, 1), Blocking(8, 16, 2, 2), Blocking(32, 128, 4)])
def test_no_blocking_changes_a_product(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, n_rows: int, blocking: Blocking
) -> None:
    monkeypatch.setattr(activations, "TENSOR_CORE_ROWS", 17)  # as where there are none
    weight = quantized(generator, 32, 288)  # 36 words, which no tile divides
    x = rows(generator, n_rows, 288)
    y = torch.full((n_rows, 32), torch.nan, device=DEVICE)
    matvec(packed(x, 4, "half"), weight, y, blocking=blocking)
    assert error(y, x @ dense_of(weight).T) < BOUND["half"]


@pytest.mark.parametrize("n_rows", [5, 8, 13])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "in_features"), [(32, 224), (64, 192), (96, 288), (128, 384), (None, 96)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_product_on_tensor_cores_is_as_exact_as_bfloat16(
    generator: torch.Generator,
    n_rows: int,
    bits: int,
    group_size: int | None,
    in_features: int,
    symmetric: bool,
) -> None:
    sizes = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    weight = quantized(generator, 32, in_features, **sizes, dtype=torch.bfloat16)
    x = rows(generator, n_rows, in_features)
    packed_x = packed(x, bits, "int8")
    assert packed_x.rounding == "bfloat16"
    for blocking in (Blocking(16, 64, 2), Blocking(32, 16, 1)):
        y = torch.full((n_rows, 32), torch.nan, device=DEVICE)
        matvec(packed_x, weight, y, blocking=blocking)
        assert error(y, x @ dense_of(weight).T) < BOUND["bfloat16"]


@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_activations_stay_finite_and_exact(generator: torch.Generator, bits: int) -> None:
    weight = quantized(generator, 32, 128, bits=bits)
    for n_rows, rounding in ((1, "half"), (5, "bfloat16")):
        for scale in (1e-30, 60_000.0, 1e30):
            x = rows(generator, n_rows, 128) * scale
            y = torch.empty(n_rows, 32, device=DEVICE)
            matvec(packed(x, bits, "half"), weight, y)
            assert error(y.double(), x.double() @ dense_of(weight).double().T) < BOUND[rounding]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounding", ["int8", "half"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_get_lost(
    generator: torch.Generator, bits: int, rounding: Rounding, value: float
) -> None:
    weight = quantized(generator, 32, 64, bits=bits, symmetric=False)
    for n_rows in (1, 5):
        x = rows(generator, n_rows, 64)
        x[0, 40] = value
        y = torch.empty(n_rows, 32, device=DEVICE)
        matvec(packed(x, bits, rounding), weight, y)
        lost = y[0].isfinite() & (dense_of(weight)[:, 40] != 0)
        assert not lost.any() and y[1:].isfinite().all()


def test_zeros_give_zeros(generator: torch.Generator) -> None:
    weight = quantized(generator, 32, 64, symmetric=False)
    y = torch.full((1, 32), torch.nan, device=DEVICE)
    matvec(packed(torch.zeros(1, 64, device=DEVICE), 4, "int8"), weight, y)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize(("bits", "rounding"), [(4, "int8"), (8, "half")])
@pytest.mark.parametrize("small", [1e-29, 1e-36, 1e-38])
def test_activations_too_small_to_be_scaled_give_nothing_and_harm_nothing(
    generator: torch.Generator, small: float, bits: int, rounding: Rounding
) -> None:
    """127 over the largest of a quad is infinite below 4e-37."""
    weight = quantized(generator, 32, 64, bits=bits)
    x = rows(generator, 1, 64)
    x[:, :32] *= small
    y = x.new_empty(1, 32)
    matvec(packed(x, bits, rounding), weight, y)
    assert error(y, x @ dense_of(weight).T) < BOUND[rounding]


CHAINS = [
    (4, 4, 1, 4),
    (8, 4, 3, 2),
    (4, 8, 2, 8),
    (16, 4, 3, 4),
    (4, 16, 1, 4),
    (4, 4, 5, 16),
    (8, 4, 16, 32),
    (4, 16, 6, 16),
]


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

    bound = BOUND["half" if n_rows < activations.TENSOR_CORE_ROWS else "bfloat16"]
    expected_stream = h + x @ dense_of(first).T
    expected_normed = F.rms_norm(expected_stream, (dim,), norm_weight, EPS)
    gate, up = (expected_normed @ dense_of(gate_up).T).chunk(2, dim=-1)
    expected_hidden = F.silu(gate) * up
    assert error(stream, expected_stream) < bound
    if outputs < 32:  # else a program packs what it has, and stores it nowhere else
        assert error(hidden, expected_hidden) < 4 * bound
    assert error(y, expected_hidden @ dense_of(last).T) < 4 * bound
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
        assert (
            n_rows == 0
            or error(y.float(), expected.float()) < BOUND["half" if n_rows == 1 else "bfloat16"] + 2**-8
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, 0), (8, 32), (8, 0)])
def test_a_dequantized_tile_is_the_reference_s_rounded_once(
    generator: torch.Generator, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = quantized(
        generator, 19, 384, bits=bits, group_size=group_size, symmetric=symmetric, dtype=torch.bfloat16
    )
    tile = torch.empty(16, 384, dtype=dtype, device=DEVICE)
    dequantize(weight, 3, tile)
    cut_off = dtype == torch.bfloat16 and DEVICE == "cpu"  # by the interpreter, which does not round
    expected = dense_of(weight)[3:].to(dtype)
    torch.testing.assert_close(tile, expected, rtol=2**-7 if cut_off else 0, atol=0)


def test_a_weight_larger_than_the_tile_is_multiplied_in_parts(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "TILE_BYTES", 64 * 4 * 24)
    weight = quantized(generator, 64, 64)
    x = rows(generator, 17, 64)
    y = matmul.int4_matmul(x, weight.words.view(torch.uint8), weight.scales, None)
    assert error(y, x @ dense_of(weight).T) < 1e-6


@pytest.mark.parametrize("capability", [80, 90])
def test_the_tile_kernel_compiles_without_a_gpu_and_moves_nothing_between_lanes(
    capability: int, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "cannot compile" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    for name, (n_products, n_exchanges) in json.loads(done.stdout).items():
        assert n_products > 0, f"{name} has no tensor core's product in its loop"
        assert n_exchanges == 0, (
            f"{name} has {n_exchanges} accesses of shared memory and shuffles in its loop"
        )


VARIANTS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4, 16 rows": {"ROWS": 16},
    "int4, narrow groups, zeros": {"GROUPS": "narrow", "ASYMMETRIC": True},
    "int8": {"BITS": 8, "GROUPS": "channel"},
    "swiglu": {"EPILOGUE": "swiglu_and_pack", "N_SUMS": 128},
}


def loop_of_compiled(capability: int, **changes: Any) -> tuple[int, int]:
    """Products of tensor cores in the kernel's loop, and what moves values between lanes in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant.kernels.tiles import tile_kernel

    names = tile_kernel.arg_names
    constants = {
        "BITS": 4,
        "ASYMMETRIC": False,
        "GROUPS": "wide",
        "EPILOGUE": "add_and_pack",
        "NEXT_BITS": 4,
        "NEXT_ROUNDING": "bfloat16",
        "N_SUMS": 0,
        "ROWS": 8,
        "BLOCK_OUT": 16,
        "N_TILES": 8,
        "DEPTH": 2,
        "EVEN": True,
        "WARPS": 4,
        "PTX": True,
        "PDL": capability >= 90,
    } | changes
    pointers = {"weight": "*i16", "zeros": "*i8", "counters": "*i32", "eps": "fp32"}
    pointers |= dict.fromkeys(["x_scales", "sums", "y", "next_scales", "next_sums"], "*fp32")
    pointers |= dict.fromkeys(["x", "scales", "norm_weight", "next_x"], "*bf16")
    aligned = ("x", "weight", "y", "norm_weight", "next_x", "n_words", "n_groups", "out_features")
    source = ASTSource(
        fn=tile_kernel,
        signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    blocks = re.split(r"^\$L\w+:", made.asm["ptx"], flags=re.M)
    loop = max(blocks, key=lambda block: block.count("mma.sync"))
    loop = loop[: loop.rindex("mma.sync")]  # behind the last product the sums meet
    return loop.count("mma.sync"), len(re.findall(r"(?:ld|st)\.shared|shfl|ldmatrix|bar\.sync|\.local", loop))


if __name__ == "__main__":
    try:
        found = {name: loop_of_compiled(int(sys.argv[1]), **changes) for name, changes in VARIANTS.items()}
    except (ImportError, RuntimeError) as problem:  # without NVIDIA's backend
        sys.exit(f"cannot compile: {problem!r}")
    print(json.dumps(found))
