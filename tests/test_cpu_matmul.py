"""The CPU's matmuls with every instruction set of this machine, against exact products and their stated bounds."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import llvmlite.binding as llvm
import pytest
import torch
from llvmlite import ir
from program import environment

from quant.kernels.cpu import isa, vectors
from quant.kernels.cpu.layout import ROWS, Interleaved, interleave, restored, unit_of
from quant.ops import dequantize, interleaved_matmul
from quant.schemes.affine import Affine, AffineLinear

CPU = torch.device("cpu")
LARGEST = {4: 127, 8: 32767}
ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = [
    (bits, scale_dtype, symmetric)
    for bits in (4, 8)
    for scale_dtype, symmetric in (
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.float32, True),
    )
]
SHAPES = [(16, 32, 32), (50, 192, 64), (7, 256, 128), (33, 384, 384), (90, 160, 160), (1, 512, 256)]
"""out_features, in_features and group size: blocks that are whole or not, units of 32, 64 and 128, and whole rows."""

N_TOKENS = (1, 3, 4, 8, 21)
"""One row, few, and tiles of all sizes with some left over."""


def random_weight(
    bits: int, shape: tuple[int, int, int], scale_dtype: torch.dtype, symmetric: bool
) -> tuple[Interleaved, torch.Tensor]:
    """A weight in the kernels' layout and its values, float64; codes, scales and zero points take all values."""
    out_features, in_features, group_size = shape
    generator = torch.Generator().manual_seed(in_features + out_features)
    qweight = torch.randint(
        0, 256, (out_features, in_features * bits // 8), dtype=torch.uint8, generator=generator
    )
    scales = (torch.rand((out_features, in_features // group_size), generator=generator) - 0.3).mul(1e-3)
    scales = scales.to(scale_dtype)
    low, high = -(1 << bits - 1), 1 << bits - 1
    zeros = torch.randint(low, high, scales.shape, generator=generator).to(torch.int8)
    parts = (qweight, scales, None if symmetric else zeros, in_features, bits)
    made = interleave(*parts)
    assert made is not None
    return made, dequantize(*parts).double()


def bound(x: torch.Tensor, w: torch.Tensor, weight: Interleaved) -> torch.Tensor:
    """What `quant.kernels.cpu.matmul` states, for x and w in float64: (n_tokens, out_features)."""
    largest = x.abs().unflatten(-1, (-1, weight.x_unit)).amax(-1)  # (n_tokens, n_x_units)
    magnitude = largest @ w.abs().unflatten(-1, (-1, weight.x_unit)).sum(-1).T
    return magnitude * (1 / (2 * LARGEST[weight.bits]) + (weight.n_x_units + 6) * 2.0**-24)


def check_random_weights() -> None:
    """Run in processes of their own, each with a cap."""
    for (bits, scale_dtype, symmetric), shape in product(KINDS, SHAPES):
        weight, w = random_weight(bits, shape, scale_dtype, symmetric)
        for n_tokens, dtype in zip(N_TOKENS, (torch.float32, *ROUNDOFF, torch.float32), strict=True):
            generator = torch.Generator().manual_seed(n_tokens)
            x = torch.randn((n_tokens, shape[1]), generator=generator).mul(3).to(dtype)
            x[0, : shape[1] // 2] *= 100  # an outlier for some units
            y = interleaved_matmul(x, weight)
            assert y.dtype == dtype and y.shape == (n_tokens, shape[0]) and y.is_contiguous()
            exact = x.double() @ w.T
            allowed = 1.001 * (bound(x.double(), w, weight) + ROUNDOFF[dtype] * exact.abs())
            assert ((y.double() - exact).abs() <= allowed).all(), (
                bits,
                scale_dtype,
                symmetric,
                shape,
                n_tokens,
            )


def check_extremes() -> None:
    """Every product as large as it gets, of either sign: a sum that saturated or overflowed would be far off."""
    for bits, code, sign, zero in product((4, 8), (0, 255), (1.0, -1.0), (None, 0, "lowest", "highest")):
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        at = {"lowest": low, "highest": high, 0: 0, None: 0}[zero]
        qweight = torch.full((20, 256 * bits // 8), code, dtype=torch.uint8)
        scales = torch.ones((20, 2), dtype=torch.bfloat16)
        zeros = None if zero is None else torch.full((20, 2), at, dtype=torch.int8)
        weight = interleave(qweight, scales, zeros, 256, bits)
        assert weight is not None and weight.unit == 128
        for n_tokens in (1, 13):
            x = torch.full((n_tokens, 256), sign * LARGEST[bits])  # rounded to itself, at a scale of 1
            w = (low if code == 0 else high) - at
            y, exact = interleaved_matmul(x, weight), 256 * w * sign * LARGEST[bits]
            assert (y.double() - exact).abs().max() <= abs(exact) * 2.0**-22, (bits, code, sign, zero)


def check_what_is_not_finite() -> None:
    """It stays in its row; and zeros and the tiniest numbers give what they should."""
    for bits in (4, 8):
        weight, w = random_weight(bits, (40, 256, 128), torch.bfloat16, symmetric=True)
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = torch.ones((9, 256))
            x[4, 77] = bad
            y = interleaved_matmul(x, weight)
            assert y[4].isnan().all() and y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
        for small in (0.0, 1e-45, 1e-38, -1e-30):
            y = interleaved_matmul(torch.full((2, 256), small), weight)
            assert (y.double() - small * w.sum(1)).abs().max() < 1e-26
        assert interleaved_matmul(torch.ones((0, 256)), weight).shape == (0, 40)
        assert interleaved_matmul(torch.full((2, 256), 3e38), weight).shape == (2, 40)


def check_threads() -> None:
    """Who computes what is left to chance, but not what comes out."""
    weight, _ = random_weight(4, (1000, 512, 128), torch.bfloat16, symmetric=True)
    x = torch.randn((37, 512), generator=torch.Generator().manual_seed(0))
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results += [interleaved_matmul(x, weight) for _ in range(5)]
    assert all(torch.equal(one, results[0]) for one in results)


def run_capped(name: str, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process with an instruction set's cap."""
    settings = environment(Path.home(), **{isa.CAP: name}, **env)
    settings["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=240
    )


@pytest.mark.parametrize("name", [one.name for one in isa.available()])
def test_products_are_within_the_stated_bound_with_every_instruction_set(name: str) -> None:
    code = (
        "from test_cpu_matmul import *\n"
        "from quant.kernels.cpu.isa import chosen\n"
        f"assert chosen().name == {name!r}\n"
        "assert interleaved_matmul.on('cpu') is not interleaved_matmul.reference\n"
        "check_random_weights(), check_extremes(), check_what_is_not_finite(), check_threads()\n"
    )
    done = run_capped(name, code)
    assert done.returncode == 0, done.stderr


def test_an_instruction_set_that_is_not_here_leaves_the_reference_and_one_line() -> None:
    code = "from test_cpu_matmul import *\nw, _ = random_weight(4, (16, 32, 32), torch.float16, True)\n"
    done = run_capped("avx10000", code + "interleaved_matmul(torch.ones(1, 32), w)")
    assert done.returncode == 0 and "avx10000" in done.stderr and len(done.stderr.splitlines()) == 1


INSTRUCTIONS = {
    "avx512vnni": (
        "x86_64-unknown-linux-gnu",
        ("vpdpbusd", "zmm"),
        ("vpdpwssd|vpmaddwd", "zmm"),
        "prefetcht0",
    ),
    "avxvnni": ("x86_64-unknown-linux-gnu", ("vpdpbusd", "ymm"), ("vpdpwssd|vpmaddwd", "ymm"), "prefetcht0"),
    "avx2": ("x86_64-unknown-linux-gnu", ("vpmaddubsw", "ymm"), ("vpmaddwd", "ymm"), "prefetcht0"),
    "sdot": ("aarch64-unknown-linux-gnu", ("sdot", "v"), (r"\tmla", "v"), "prfm"),
    "plain": ("x86_64-unknown-linux-gnu", ("pmaddwd", "xmm"), ("pmaddwd", "xmm"), "prefetcht0"),
}
"""Triple, the instruction and the registers of products of 4 and of 8 bits, and of a prefetch. Where it finds that
shorter, LLVM makes `vpmaddwd` and an addition of `vpdpwssd`."""


def assembly(one: isa.Isa, bits: int, scale: str, n_tokens: int) -> str:
    """The inner loops compiled for a processor of that kind, whatever this machine is."""
    from quant.kernels.cpu.tile import emit_tile

    module, i64 = ir.Module(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 6), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    emit_tile(builder, f"{one.name} {bits} {scale} asym", n_tokens, *function.args)
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(INSTRUCTIONS[one.name][0]).create_target_machine(cpu=one.cpu, opt=3)
    machine.set_asm_verbosity(True)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize("one", isa.ISAS, ids=lambda one: one.name)
def test_inner_loops_are_the_instructions_that_they_are_meant_to_be(
    one: isa.Isa, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_intels = isa.Prefetching(2304, 1, every_line=True)
    monkeypatch.setattr(vectors, "prefetching", lambda: as_on_intels)  # whatever this machine is
    _, *products, prefetch = INSTRUCTIONS[one.name]
    for bits, (instruction, register) in zip((4, 8), products, strict=True):
        lines = assembly(one, bits, "bf16", n_tokens=1).splitlines()
        found = [line for line in lines if re.search(instruction, line) and register in line]
        assert len(found) >= 8 * (ROWS // one.lanes), f"{instruction} for {bits} bits"
        assert sum(prefetch in line for line in lines) >= 5
        assert not any("call" in line or "\tbl\t" in line for line in lines)


@pytest.mark.parametrize(
    ("host", "instruction", "ahead", "n_lines"),
    [
        ("sapphirerapids", "prefetcht0", 2304, 5),
        ("znver3", "prefetcht1", 12288, 5),
        ("znver4", "prefetcht1", 12288, 1),
    ],
)
def test_lines_are_asked_for_as_it_helps_on_the_makers_processors(
    host: str, instruction: str, ahead: int, n_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "target", lambda: (host, ""))
    monkeypatch.setattr(vectors, "prefetching", isa.prefetching.__wrapped__)
    lines = assembly(isa.ISAS[0], 4, "bf16", n_tokens=1).splitlines()
    found = [line for line in lines if "prefetch" in line]
    assert len(found) == n_lines and all(instruction in line for line in found)
    assert sum(str(ahead) in line for line in found) == 1


@pytest.mark.parametrize("one", [one for one in isa.ISAS if one.name != "plain"], ids=lambda one: one.name)
def test_sums_of_the_innermost_loop_stay_in_registers(one: isa.Isa) -> None:
    """The totals of units may be spilled around it."""
    for n_tokens in (1, one.tokens):
        spills, in_loop = 0, False
        for line in assembly(one, 4, "f16", n_tokens).splitlines():
            if "Inner Loop Header" in line or "Parent Loop" in line:
                in_loop = True
            elif line.startswith(("# %bb.", "// %bb.")):
                in_loop = False
            spills += in_loop and ("Spill" in line)
        assert spills == 0, n_tokens


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_gives_back_what_was_stored(bits: int, shape: tuple[int, int, int]) -> None:
    for (_, scale_dtype, symmetric), rows in product(KINDS[:3], ((0, None), (3, 5), (0, 1))):
        out_features, in_features, group_size = shape
        start, stop = rows[0], min(rows[1] or out_features, out_features)
        if start >= stop:
            continue
        qweight = torch.arange(out_features * in_features * bits // 8).mul(37).to(torch.uint8)
        qweight = qweight.view(out_features, -1)
        scales = torch.randn(out_features, in_features // group_size).to(scale_dtype)
        zeros = None if symmetric else torch.arange(scales.numel()).to(torch.int8).view(scales.shape)
        weight = interleave(qweight, scales, zeros, in_features, bits)
        assert weight is not None
        for ours, theirs in zip(restored(weight, start, stop), (qweight, scales, zeros), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs[start:stop])


def test_the_layout_takes_as_much_as_what_is_stored_and_little_more() -> None:
    for bits, group_size, scale_dtype in (
        (4, 128, torch.bfloat16),
        (4, None, torch.bfloat16),
        (8, None, torch.float32),
    ):
        qweight = torch.zeros((4096, 4096 * bits // 8), dtype=torch.uint8)
        scales = torch.ones((4096, 4096 // (group_size or 4096)), dtype=scale_dtype)
        weight = interleave(qweight, scales, None, 4096, bits)
        assert weight is not None
        assert weight.size_bytes <= (qweight.nbytes + scales.nbytes) * (1 if group_size else 1.032)


def linear_of(scheme: Affine, out_features: int, in_features: int) -> AffineLinear:
    w = torch.randn((out_features, in_features), generator=torch.Generator().manual_seed(1)) * 0.05
    linear = scheme.linear(in_features, out_features)
    linear.load_stored(scheme.quantize(w, torch.bfloat16), CPU)
    return linear


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, None), (8, 64), (8, None)])
def test_a_prepared_layer_keeps_its_weight_and_not_what_was_stored(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    linear = linear_of(Affine(bits, group_size, symmetric), 70, 256)
    x, before = torch.randn((2, 3, 256), generator=torch.Generator().manual_seed(2)), linear.dense_rows(0, 70)
    exact = linear(x)
    linear.prepare()
    assert linear.qweight is None and linear.scales is None and linear.zeros is None
    for start, stop in ((0, 70), (0, 1), (15, 34), (69, 70)):
        assert torch.equal(linear.dense_rows(start, stop), before[start:stop])
    y = linear(x)
    assert y.shape == exact.shape
    error = float((y - exact).norm() / exact.norm())
    assert 0 < error < (0.01 if bits == 4 else 1e-4)  # 0.7 % and 0.003 % for normal x


@pytest.mark.parametrize(("in_features", "group_size"), [(33, None), (240, 48), (80, None)])
def test_shapes_that_the_kernels_do_not_know_are_left_to_the_reference(
    in_features: int, group_size: int | None
) -> None:
    assert unit_of(in_features, group_size or in_features) is None
    linear = linear_of(Affine(4, group_size), 24, in_features)
    linear.prepare()
    assert linear.interleaved is None
    x = torch.randn((3, in_features), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(linear(x), x @ linear.dense_rows(0, 24).T, atol=1e-5, rtol=1e-5)


def test_without_kernels_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")
    linear = linear_of(Affine(4, 32), 16, 64)
    linear.prepare()
    assert linear.interleaved is None and linear.qweight is not None


CACHE_CODE = (
    "from test_cpu_matmul import *\nw, _ = random_weight(4, (16, 32, 32), torch.bfloat16, True)\n"
    "interleaved_matmul(torch.ones(1, 32), w)"
)


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs Linux to see which libraries are loaded"
)
def test_there_is_one_pool_of_threads_and_it_is_that_of_torch() -> None:
    code = CACHE_CODE + (
        "\nfrom quant.kernels.cpu import pool\n"
        "assert pool._parallel() is not pool._by_python_threads\n"
        "w, _ = random_weight(4, (4096, 512, 32), torch.bfloat16, True)\n"
        "torch.set_num_threads(3)\n"
        "x = torch.randn(512, 512); x @ x.T; before = len(os.listdir('/proc/self/task'))\n"
        "interleaved_matmul(x, w); assert len(os.listdir('/proc/self/task')) == before, before\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1]}\n"
        "assert len(names) == 1, names\n"
    )
    done = run_capped(isa.available()[0].name, code)
    assert done.returncode == 0, done.stderr


def test_neither_numba_nor_llvm_is_imported_before_the_first_product() -> None:
    code = (
        "import sys; from test_cpu_matmul import linear_of, Affine, torch\n"
        "linear = linear_of(Affine(4, 32), 16, 64); linear.prepare()\n"
        "assert not {'numba', 'quant.kernels.cpu.machine_code'} & set(sys.modules)\n"
        "linear(torch.ones(1, 64)); assert 'quant.kernels.cpu.machine_code' in sys.modules\n"
    )
    done = run_capped(isa.available()[0].name, code)
    assert done.returncode == 0, done.stderr
    light = "import sys; from mistralcli.cli.app import main; main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", light, "--help"], capture_output=True, text=True, check=True)
    assert not {"numba", "llvmlite"} & set(done.stderr.split())
