"""The attention kernels in Triton against the reference operators: compiled on a GPU, interpreted without one.

Slots that no query sees are NaN for the kernels, or their scales are: whoever reads one shows it. Run as a program,
this file compiles the kernels for GPUs that need not be here and prints what they spill.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistralcli.cache import Ring, Seen, quantized, write_ring
from mistralcli.ops import apply_rotary, attention, rotary_tables

triton = pytest.importorskip("triton")

from mistralcli.kernels import decode_attention as decode  # noqa: E402
from mistralcli.kernels import flash_attention as flash  # noqa: E402
from mistralcli.kernels import pointwise  # noqa: E402
from quant.kernels.activations import Activations  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = bool(triton.knobs.runtime.interpret)
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED,
        reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported",
    ),
    # The interpreter of triton 3.6 makes loop bounds of arrays with one element.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

ROUNDING = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-6}
"""Largest error relative to the largest value, where both sides have the same q, k and v.

A mean of values is off by what its weights are off by, and then the result is rounded: twice 2⁻¹¹ for float16, and
twice 2⁻⁷ for bfloat16, which the interpreter cuts off instead of rounding (half of that on a GPU). An int8 cache is
unpacked exactly, to bfloat16 or float32. In float32 a sum of
head_dim ≤ 128 products of size 1 is off by about 2⁻²⁴ · sqrt(128), and so are a score and its weight: within 2⁻²¹.
"""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the kernel rounds float32 to a cache's dtype; Triton's interpreter cuts bfloat16 off."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return x.to(dtype)


def poisoned(cache: torch.Tensor | None, used: torch.Tensor) -> Any:
    """A cache (n_seqs, n_kv_heads, capacity, …) with NaN in every slot that is not `used` (n_seqs, capacity)."""
    if cache is None:
        return None
    unused = ~used.view(len(used), 1, -1, *[1] * (cache.ndim - 3))
    return cache.masked_fill(unused, float("nan") if cache.is_floating_point() else 99).to(DEVICE)


@dataclass(frozen=True)
class Shape:
    """n_heads query heads on n_kv_heads, and a ring, of int8 where that is said."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None
    max_seq_len: int = 160
    slack: int = 24
    int8: bool = False

    @property
    def ring(self) -> Ring:
        return Ring.of(self.window, self.max_seq_len, self.slack)

    @property
    def operands(self) -> torch.dtype:
        """What products are made in."""
        return torch.bfloat16 if self.int8 and self.dtype == torch.float16 else self.dtype

    def cache(self, n_seqs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys or values, and their scales."""
        x = randn(n_seqs, self.n_kv_heads, self.ring.capacity, self.head_dim, seed=seed).to(self.dtype)
        return self.stored(x)

    def stored(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return quantized(x) if self.int8 else (x, None)


MULTI_HEAD = Shape(3, 3, 16, torch.float32, window=None)
GROUPED = Shape(6, 2, 24, torch.float32, window=19)
GROUPED_BF16 = Shape(8, 2, 128, torch.bfloat16, window=50)
GROUPED_FP16 = Shape(4, 2, 64, torch.float16, window=33)
MULTI_QUERY = Shape(5, 1, 96, torch.float32, window=7)
NARROW = Shape(2, 1, 16, torch.bfloat16, window=1, slack=1)
MULTI_HEAD_INT8 = replace(MULTI_HEAD, int8=True)
GROUPED_INT8 = replace(GROUPED, int8=True)
GROUPED_BF16_INT8 = replace(GROUPED_BF16, int8=True)
GROUPED_FP16_INT8 = replace(GROUPED_FP16, int8=True)
MULTI_QUERY_INT8 = replace(MULTI_QUERY, int8=True)


def largest(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return (x if scales is None else x * scales[..., None]).abs().max()


def check_flash(shape: Shape, starts: Sequence[int], counts: Sequence[int]) -> None:
    """Sequences of `counts` queries from the positions `starts` on, padded to the longest, against the reference."""
    n_seqs, n_tokens = len(starts), max(1, *counts)
    positions = torch.full((n_seqs, n_tokens), -1)
    for row, start, count in zip(positions, starts, counts, strict=True):
        row[:count] = torch.arange(start, start + count)
    seen = Seen(positions, shape.ring, shape.ring.capacity)
    q = randn(n_seqs, n_tokens, shape.n_heads, shape.head_dim).to(shape.dtype).transpose(1, 2)
    (k, key_scales), (v, value_scales) = shape.cache(n_seqs, 1), shape.cache(n_seqs, 2)
    expected = attention.reference(q.float(), k, v, seen, key_scales, value_scales)
    used = seen.mask.any(dim=1)
    given = [poisoned(one, used) for one in (k, v, key_scales, value_scales)]
    out = flash.attention(q.to(DEVICE), *given[:2], seen.to(DEVICE), *given[2:]).cpu()
    assert out.dtype == shape.dtype and out.shape == expected.shape
    error = (out.float() - expected).abs().max() / largest(v, value_scales)
    assert error <= ROUNDING[shape.operands]  # false for NaN too
    assert not out.transpose(1, 2)[positions < 0].any()


@pytest.mark.parametrize(
    ("shape", "starts", "counts"),
    [
        (MULTI_HEAD, [0], [1]),
        (MULTI_HEAD, [0], [24]),
        (MULTI_HEAD, [40, 0, 7], [21, 5, 0]),
        (GROUPED, [0], [24]),
        (GROUPED, [100], [23]),
        (GROUPED, [90, 3, 61], [1, 24, 13]),
        (GROUPED_BF16, [130], [9]),
        (GROUPED_FP16, [97, 0], [11, 3]),
        (MULTI_QUERY, [150, 0, 31], [10, 1, 9]),
        (NARROW, [159], [1]),
        (MULTI_HEAD_INT8, [40, 0, 7], [21, 5, 0]),
        (GROUPED_INT8, [90, 3, 61], [1, 24, 13]),
        (GROUPED_BF16_INT8, [130], [9]),
        (GROUPED_FP16_INT8, [97, 0], [11, 3]),
        (MULTI_QUERY_INT8, [150, 0, 31], [10, 1, 9]),
    ],
)
def test_flash_attention_agrees_with_the_reference(
    shape: Shape, starts: list[int], counts: list[int]
) -> None:
    check_flash(shape, starts, counts)


@settings(deadline=None, max_examples=25)
@given(
    group=st.integers(1, 5),
    window=st.none() | st.integers(1, 60),
    slack=st.integers(1, 24),
    sequences=st.lists(st.tuples(st.integers(0, 135), st.integers(0, 24)), min_size=1, max_size=2),
    int8=st.booleans(),
)
def test_flash_attention_agrees_for_any_window_slack_and_lengths(
    group: int, window: int | None, slack: int, sequences: list[tuple[int, int]], int8: bool
) -> None:
    shape = Shape(group, 1, 16, torch.float32, window, slack=slack, int8=int8)
    check_flash(shape, [start for start, _ in sequences], [min(count, slack) for _, count in sequences])


def check_decode(shape: Shape, positions: Sequence[int], n_splits: int) -> None:
    """A token at each position against rotary, write and attention by the reference operators."""
    n_seqs, ring = len(positions), shape.ring
    n_heads, n_kv_heads, head_dim = shape.n_heads, shape.n_kv_heads, shape.head_dim
    at = torch.tensor(positions)
    qkv = randn(n_seqs, (n_heads + 2 * n_kv_heads) * head_dim)
    q, k, v = qkv.view(n_seqs, 1, -1, head_dim).split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    cos, sin = rotary_tables(at[:, None], head_dim, 1e4)
    q, k = apply_rotary.reference(q, cos, sin), apply_rotary.reference(k, cos, sin)
    operands = torch.bfloat16 if shape.int8 else shape.dtype  # q comes in float32
    q = rounded(q, operands)
    if not shape.int8:
        k, v = rounded(k, operands), rounded(v, operands)
    before = [*shape.cache(n_seqs, 1), *shape.cache(n_seqs, 2)]
    keys, key_scales, values, value_scales = (None if x is None else x.clone() for x in before)
    assert keys is not None and values is not None
    slots = at % ring.capacity
    seen = Seen(at[:, None], ring, ring.capacity)
    write_ring.reference(keys, k, seen, key_scales)
    write_ring.reference(values, v, seen, value_scales)
    q = q.float().transpose(1, 2)
    expected = attention.reference(q, keys, values, seen, key_scales, value_scales).flatten(1)

    used = seen.mask[:, 0].clone()
    used[range(n_seqs), slots] = False  # the new position's is written before it is read, or not read at all
    given_keys, given_key_scales, given_values, given_value_scales = (poisoned(x, used) for x in before)
    scratch = decode.Scratch.empty(n_seqs, n_heads, n_kv_heads, head_dim, DEVICE, n_splits)
    angles = [table[:, 0].contiguous().to(DEVICE) for table in (cos, sin)]
    # On a GPU again and again: a launch leaves counters and ring as it found them, whoever arrives last.
    for _ in range(1 if INTERPRETED else 20):
        out = torch.full((n_seqs, n_heads * head_dim), float("nan"), device=DEVICE)
        decode.decode_attention(
            qkv.to(DEVICE),
            *angles,
            given_keys,
            given_values,
            at.to(DEVICE),
            scratch,
            Activations.plain(out),
            ring,
            key_scales=given_key_scales,
            value_scales=given_value_scales,
        )
        error = (out.cpu() - expected).abs().max() / largest(values, value_scales)
        assert error <= ROUNDING[operands]
        assert not scratch.arrived.any()
    used[range(n_seqs), slots] = True
    # A GPU fuses the rotation's products and sums, which may round a key to the next number.
    atol, rtol = (0.0, 0.0) if INTERPRETED else (1e-6, torch.finfo(shape.dtype).eps)
    for cache, wanted in ((given_keys, keys), (given_values, values)):
        atol = 1.0 if shape.int8 and not INTERPRETED else atol
        torch.testing.assert_close(cache, poisoned(wanted, used), equal_nan=True, atol=atol, rtol=rtol)
    for scales, wanted in ((given_key_scales, key_scales), (given_value_scales, value_scales)):
        torch.testing.assert_close(scales, poisoned(wanted, used), equal_nan=True, atol=0.0, rtol=4e-7)


@pytest.mark.parametrize(
    ("shape", "positions", "n_splits"),
    [
        (MULTI_HEAD, [0], 2),
        (MULTI_HEAD, [159, 0, 64], 4),
        (GROUPED, [1], 4),
        (GROUPED, [85, 42, 17], 1),
        (GROUPED, [150], 32),
        (GROUPED_BF16, [149], 2),
        (GROUPED_FP16, [90, 0, 5], 2),
        (MULTI_QUERY, [71, 8, 0], 2),
        (NARROW, [0], 2),
        (NARROW, [33], 2),
        (MULTI_HEAD_INT8, [159, 0, 64], 4),
        (GROUPED_INT8, [85, 42, 17], 1),
        (GROUPED_INT8, [150], 32),
        (GROUPED_BF16_INT8, [149], 2),
        (MULTI_QUERY_INT8, [71, 8, 0], 2),
    ],
)
def test_decode_attention_agrees_with_rotary_write_and_attention(
    shape: Shape, positions: list[int], n_splits: int
) -> None:
    check_decode(shape, positions, n_splits)


@settings(deadline=None, max_examples=20)
@given(
    group=st.integers(1, 5),
    window=st.none() | st.integers(1, 60),
    slack=st.integers(1, 24),
    positions=st.lists(st.integers(0, 159), min_size=1, max_size=2),
    n_splits=st.sampled_from([1, 2, 4, 8]),
    int8=st.booleans(),
)
def test_decode_attention_agrees_for_any_window_and_positions(
    group: int, window: int | None, slack: int, positions: list[int], n_splits: int, int8: bool
) -> None:
    check_decode(Shape(group, 1, 16, torch.float32, window, slack=slack, int8=int8), positions, n_splits)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_int8_ring_is_written_as_the_reference_writes_it(dtype: torch.dtype) -> None:
    """Zeros, ties, tiny and huge vectors among others, padding and a wrap: the same codes and the same scales."""
    positions = torch.tensor([[16, 17, 18, 19, 20, 21, 22], [3, 4, -1, -1, -1, -1, -1]])
    seen = Seen(positions, Ring(20, 9), 20)
    x = randn(2, 7, 3, 24).to(dtype)
    x[0, 1] = 0
    x[0, 2] = torch.arange(24) / 2 - 11.5  # with a largest of 127 / 2 behind it, codes are halves: ties
    x[0, 2, :, 0] = 63.5
    x[0, 3] *= 1e-4
    x[0, 4] *= 1e4
    x[0, 5, 1, 7], x[0, 6, 2, 3] = float("nan"), float("inf")
    made = []
    for write, device in ((write_ring.reference, "cpu"), (pointwise.write_ring, DEVICE)):
        codes = torch.zeros(2, 3, 20, 24, dtype=torch.int8, device=device)
        scales = torch.zeros(2, 3, 20, device=device)
        write(codes, x.to(device), seen.to(device), scales)
        made.append((codes.cpu(), scales.cpu()))
    (codes, scales), (kernel_codes, kernel_scales) = made
    lost = ~scales.isfinite()
    assert int(lost.sum()) == 2 and torch.equal(lost, ~kernel_scales.isfinite())
    assert torch.equal(codes[~lost], kernel_codes[~lost]) and torch.equal(scales[~lost], kernel_scales[~lost])


LARGE = Shape(8, 2, 128, torch.bfloat16, window=1000, max_seq_len=4000, slack=600)


@pytest.mark.skipif(DEVICE == "cpu", reason="too many keys for the interpreter")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [1000, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_blocks_between_the_edges_agree_too(window: int | None, dtype: torch.dtype, int8: bool) -> None:
    shape = replace(LARGE, window=window, dtype=dtype, int8=int8)
    check_flash(shape, [3001, 0, 1700], [599, 600, 77])
    check_decode(shape, [3600, 0, 1597], 16)


def test_the_number_of_splits_is_a_power_of_two_that_fills_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = type("Card", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    pairs = [1, 4, 8, 16, 24, 64, 128, 1000]
    assert [decode.splits_for(n, "cuda") for n in pairs] == [32, 32, 16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_gpu_and_spill_nothing(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True
    )
    if "cannot compile" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert len(usage) == 8
    for name, one in usage.items():
        assert one["local"] == one["stack"] == 0, f"{name} spills: {one}"
        most = 227 if capability == 90 else 160 if name.startswith("flash") else 99
        assert one["shared"] <= most << 10, f"{name} takes more than {most} KiB of shared memory: {one}"
        assert one["tensor_core_products"] > 0, name


POINTERS = {
    **dict.fromkeys(["q", "k", "v", "keys", "values"], "*bf16"),
    **dict.fromkeys(["qkv", "cos", "sin", "sums_out", "statistics", "out_scales"], "*fp32"),
    **dict.fromkeys(["key_scales", "value_scales"], "*fp32"),
    "positions": "*i64",
    "arrived": "*i32",
}
SHAPE = {"GROUP": 4, "HEAD_DIM": 128, "INTERPRETED": False}
UNALIGNED = {"n_tokens", "positions_seq", "n_kv_heads", "capacity", "scale"}
STORED = {
    "bf16": {"key_scales": None, "value_scales": None},
    "i8": {"keys": "*i8", "values": "*i8", "k": "*i32", "v": "*i32"},
}
"""By what a cache holds: what differs from the pointers above."""


def compiled(
    kernel: Any, out: str, stored: str, constants: dict[str, Any], capability: int, warps: int
) -> dict[str, int]:
    """What a kernel takes with head_dim 128, computing in bfloat16, compiled as a launch for a 7B model would be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {name: None for name, kind in STORED[stored].items() if kind is None}
    types = {
        "out": out,
        "scale": "fp32",
        **POINTERS,
        **STORED[stored],
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if name not in UNALIGNED and name not in constants
        },
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", listing) for name in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, listing
    return {
        "registers": int(registers[1]),
        "stack": int(stack[1]),
        "local": int(local[1]) + made.asm["ptx"].count(".local"),
        "shared": made.metadata.shared,
        "tensor_core_products": len(re.findall(r"wgmma\.mma|mma\.sync", made.asm["ptx"])),
    }


def main(capability: int) -> None:
    """Print as JSON what the kernels take: pre-fill of a chunk and of a token, decoding with a window and without."""
    tile = flash.HOPPER_TILE if capability == 90 else flash.TILE
    usage = {}
    for stored, (rows, warps) in product(STORED, ((tile.rows, tile.warps), (16, 4))):
        keys = 32 if rows == 16 and stored == "i8" else tile.keys  # as flash._tile_for
        constants = {"WINDOW": 4096, "COLUMNS": 128, "ROWS": rows, "KEYS": keys, "STAGES": tile.stages}
        constants |= SHAPE | {"positions_token": 1}
        kernel = flash._flash_kernel
        made = compiled(kernel, "*bf16", stored, constants, capability, warps)
        usage[f"flash, {rows} rows, {stored}"] = made
    blocks = decode.HOPPER_BLOCKS if capability == 90 else decode.BLOCKS
    for stored, (window, pdl) in product(STORED, ((4096, capability == 90), (0, False))):
        keys = blocks.keys if stored == "bf16" else blocks.keys // 2  # as decode._blocks_for
        constants = {"WINDOW": window, "N_SPLITS": 16, "ROWS": 8, "COLUMNS": 128, "KEYS": keys, "HEADS": 4}
        constants |= SHAPE | {"STAGES": blocks.stages, "PDL": pdl, "BITS": 4, "ROUNDING": "int8"}
        kernel = decode._decode_kernel
        made = compiled(kernel, "*i8", stored, constants, capability, blocks.warps)
        usage[f"decode, window {window}, {stored}"] = made
    print(json.dumps(usage))


if __name__ == "__main__":
    try:
        from triton.backends.nvidia import compiler  # noqa: F401
    except ImportError as error:
        sys.exit(f"this triton cannot compile for NVIDIA's cards: {error}")
    main(int(sys.argv[1]))
