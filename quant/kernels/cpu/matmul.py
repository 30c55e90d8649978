"""The matmul of int4 and int8 weights on the CPU: activations are rounded, then tiles of tokens × 16 rows multiplied.

How far it is from `quant.ops.interleaved_matmul`'s reference, to first order, with L = 127 for 4 bits and 32767 for
8 bits: an activation x of a unit is off by at most max|x of the unit| / 2L, so

    |y − exact| ≤ Σ over units  max|x| / 2L · Σ |w|  +  (n_units + 6) · 2⁻²⁴ · Σ over units max|x| Σ |w|

Sums of a unit are exact integers, and then float32: the second term has the roundings of the two scales, of
their product, of 127 / max, of the integer, and of one sum for each unit. For bfloat16 or float16 x, y is rounded to
that once more.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import numba
import torch

from quant.kernels.cpu.isa import ISAS, chosen, compile_for_chosen
from quant.kernels.cpu.layout import ROWS, Interleaved

compile_for_chosen()  # before anything is compiled

from quant.kernels.cpu import pool  # noqa: E402
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, take_task  # noqa: E402
from quant.kernels.cpu.rounding import round_unit, x_unit_bytes  # noqa: E402
from quant.kernels.cpu.tile import (  # noqa: E402
    CHUNKS,
    X_HEADER_BYTES,
    X_STEP_BYTES,
    Kind,
    multiply_tile,
)

BLOCKS_PER_TASK = 4
"""64 rows of weights: for 4096 to 14336 columns they stay in a core's second cache while all tokens pass."""

WORTH_A_THREAD = 1 << 20
"""Bytes of weights times rows of activations below which one thread does it. That takes it 50 µs; to wake a sleeping
thread takes 100 µs, one that spins 2 µs (2 virtual cores of a Xeon)."""

_SCALES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def interleaved_matmul(x: torch.Tensor, weight: Interleaved) -> torch.Tensor:
    """Stands in for `quant.ops.interleaved_matmul`; x is rounded (`quant.kernels.cpu.rounding`)."""
    rows = x.reshape(-1, weight.in_features).float().contiguous()
    n_padded = weight.n_blocks * ROWS
    y = torch.empty(len(rows), n_padded)
    _multiply(_rounded(rows, weight), weight, y)
    if n_padded > weight.out_features:
        y = y[:, : weight.out_features].contiguous()
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _rounded(rows: torch.Tensor, weight: Interleaved) -> torch.Tensor:
    """Rows of activations rounded, (n_tokens, bytes of a token), in tiles of tokens that lie side by side."""
    unit_bytes = x_unit_bytes(weight.bits, weight.unit)
    rounded = torch.empty(len(rows), unit_bytes * weight.n_units, dtype=torch.uint8)
    arguments = (rows.data_ptr(), rounded.data_ptr(), weight.n_units, weight.unit, unit_bytes)
    n_threads = torch.get_num_threads() if rows.nbytes > WORTH_A_THREAD else 1
    pool.run(_rounding_kernel(weight.bits, chosen().name, _digest()), len(rows), arguments, n_threads)
    return rounded


def _multiply(x: torch.Tensor, weight: Interleaved, y: torch.Tensor) -> None:
    """y (n_tokens, 16 · n_blocks) of rounded activations."""
    kind = Kind(chosen(), weight.bits, _SCALES[weight.scale_dtype], weight.asymmetric)
    n_tokens, n_blocks = len(y), weight.n_blocks
    n_threads = torch.get_num_threads() if weight.size_bytes * n_tokens > WORTH_A_THREAD else 1
    per_task = max(1, min(BLOCKS_PER_TASK, n_blocks // (4 * n_threads)))
    words = weight.words
    arguments = (
        words.data_ptr(),
        words.stride(0) * 4,
        n_blocks,
        per_task,
        x.data_ptr(),
        x.stride(0),
        n_tokens,
        y.data_ptr(),
        weight.n_units,
        weight.unit * weight.bits // (8 * CHUNKS * 4),
    )
    pool.run(_matmul_kernel(kind.name, _digest()), -(-n_blocks // per_task), arguments, n_threads)


@functools.cache
def _digest() -> str:
    """Of the kernels' source, for numba's cache: it looks only at the file of the function that it compiles."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _tile_of(token: int, n_tokens: int, most: int) -> tuple[int, int]:
    """The first token of the tile that a token is in, and how many are in it.

    Tiles have `most` tokens; of what is left then, one has half of that if it can, and all others have one.
    """
    rest = n_tokens // most * most
    if token < rest:
        return token // most * most, most
    if token < rest + most // 2 <= n_tokens:
        return rest, most // 2
    return token, 1


_compiled_tile_of: Any = numba.njit(_tile_of)


@functools.cache
def _rounding_kernel(bits: int, isa: str, digest: str) -> int:
    """A task is a token."""
    version = f"{isa} {digest}"
    most = next(one for one in ISAS if one.name == isa).tokens

    def round_rows(job: Any) -> None:
        assert version
        x, out, n_units, unit, unit_bytes = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
        )
        token = take_task(job)
        while token < job[N_TASKS]:
            first, size = _compiled_tile_of(token, job[N_TASKS], most)
            place, tile = token - first, out + first * n_units * unit_bytes
            for i in range(n_units):
                header = tile + i * size * unit_bytes
                steps = header + size * X_HEADER_BYTES + place * X_STEP_BYTES
                columns = x + (token * n_units + i) * unit * 4
                round_unit(bits, columns, unit, header + place * X_HEADER_BYTES, steps, size * X_STEP_BYTES)
            token = take_task(job)

    return pool.kernel(round_rows)


@functools.cache
def _matmul_kernel(kind: str, digest: str) -> int:
    """A task is some blocks of 16 rows of the weight, for all tokens: tile by tile, then what is left over."""
    name = f"{kind} {digest}"
    most = Kind.named(kind).isa.tokens
    half = most // 2

    def multiply(job: Any) -> None:
        weights, block_bytes, n_blocks, per_task = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
        )
        x, x_stride, n_tokens, y = (
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
            job[ARGUMENTS + 7],
        )
        n_units, n_steps, y_stride = job[ARGUMENTS + 8], job[ARGUMENTS + 9], n_blocks * ROWS * 4
        task = take_task(job)
        while task < job[N_TASKS]:
            token = 0
            while token < n_tokens:
                _, size = _compiled_tile_of(token, n_tokens, most)
                tile = x + token * x_stride
                for block in range(task * per_task, min((task + 1) * per_task, n_blocks)):
                    w, out = weights + block * block_bytes, y + token * y_stride + block * ROWS * 4
                    if size == most:
                        multiply_tile(name, most, w, tile, out, y_stride, n_units, n_steps)
                    elif size == half:
                        multiply_tile(name, half, w, tile, out, y_stride, n_units, n_steps)
                    else:
                        multiply_tile(name, 1, w, tile, out, y_stride, n_units, n_steps)
                token += size
            task = take_task(job)

    return pool.kernel(multiply)
