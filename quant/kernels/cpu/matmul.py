"""The matmul of int4 and int8 weights on the CPU: activations are rounded, then tiles of tokens × 16 rows multiplied.

How far it is from `quant.ops.interleaved_matmul`'s reference, to first order, with L = 127 for 4 bits and 32767 for
8 bits: an activation x of a unit of activations is off by at most max|x of the unit| / 2L, so

    |y − exact| ≤ Σ over units  max|x| / 2L · Σ |w|  +  (n_units + 6) · 2⁻²⁴ · Σ over units max|x| Σ |w|

Sums of a unit are exact integers, and then float32: the second term has the roundings of the two scales, of
the products with them, of 127 / max, of the integer, and of one sum for each unit. For bfloat16 or float16 x, y is
rounded to that once more.
"""

import ctypes
from typing import Any

import torch

from quant.kernels.cpu import pool
from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.layout import ROWS, Interleaved
from quant.kernels.cpu.machine_code import Code, kernel
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job
from quant.kernels.cpu.rounding import emit_round_unit, x_unit_bytes
from quant.kernels.cpu.shares import starts_of_shares
from quant.kernels.cpu.tile import CHUNKS, X_HEADER_BYTES, X_STEP_BYTES, Kind, emit_tile

BLOCKS_AT_ONCE = 4
"""64 rows of weights: for 4096 to 14336 columns they stay in a core's second cache while all tokens pass."""

WORTH_A_THREAD = 1 << 20
"""Bytes of weights times rows of activations below which one thread does it. That takes it 50 µs; to wake a sleeping
thread takes 100 µs, one that spins 2 µs (2 virtual cores of a Xeon)."""

_SCALES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def interleaved_matmul(x: torch.Tensor, weight: Interleaved) -> torch.Tensor:
    """Stands in for `quant.ops.interleaved_matmul`; x is rounded (`quant.kernels.cpu.rounding`)."""
    rows = x.reshape(-1, weight.in_features).float().contiguous()
    n_tokens, n_padded = len(rows), weight.n_blocks * ROWS
    rounded = torch.empty(n_tokens, rounded_bytes(weight), dtype=torch.uint8)
    y = torch.empty(n_tokens, n_padded)
    n_threads = _threads_for(rows.nbytes)
    pool.run(rounding_job(rows.data_ptr(), rounded.data_ptr(), n_tokens, weight), n_threads)
    n_threads = _threads_for(weight.size_bytes * n_tokens)
    pool.run(matmul_job(rounded.data_ptr(), n_tokens, weight, y.data_ptr(), n_threads), n_threads)
    if n_padded > weight.out_features:
        y = y[:, : weight.out_features].contiguous()
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _threads_for(n_bytes: int) -> int:
    return torch.get_num_threads() if n_bytes > WORTH_A_THREAD else 1


def rounding_job(x: int, rounded: int, n_tokens: int, weight: Interleaved) -> Job:
    """Round activations for a weight: `n_tokens` float32 rows of in_features, from the address x to that of `rounded`.

    They take `rounded_bytes` each, in tiles of tokens that lie side by side.
    """
    unit_bytes = x_unit_bytes(weight.bits, weight.x_unit)
    arguments = (x, rounded, weight.n_x_units, weight.x_unit, unit_bytes)
    return Job(kernel(_rounding_kernel, weight.bits, chosen().tokens), n_tokens, arguments)


def rounded_bytes(weight: Interleaved) -> int:
    """Bytes of a row of activations, rounded."""
    return x_unit_bytes(weight.bits, weight.x_unit) * weight.n_x_units


def matmul_job(rounded: int, n_tokens: int, weight: Interleaved, y: int, n_threads: int) -> Job:
    """Multiply rounded activations; y is the address of (n_tokens, 16 · n_blocks) float32, some padded columns last.

    The weight is shared out for n_threads, which need not be as many as run it.
    """
    kind = Kind(chosen(), weight.bits, _SCALES[weight.scale_dtype], weight.asymmetric)
    n_blocks, words = weight.n_blocks, weight.words
    least = max(1, min(BLOCKS_AT_ONCE, n_blocks // (4 * n_threads)))
    starts = starts_of_shares(n_blocks, least, n_threads)
    arguments = (
        words.data_ptr(),
        words.stride(0) * 4,
        n_blocks,
        ctypes.addressof(starts),
        rounded,
        rounded_bytes(weight),
        n_tokens,
        y,
        weight.n_units,
        weight.unit * weight.bits // (8 * CHUNKS * 4),
    )
    return Job(kernel(_matmul_kernel, kind.name), len(starts) - 1, arguments)


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


def _rounding_kernel(bits: int, most: int) -> Code:
    """A task is a token; most: as of `_tile_of`."""
    from quant.kernels.cpu.inline import inlined, njit, take_task

    tile_of, round_unit = njit(_tile_of), inlined(emit_round_unit, n_constants=1)

    def round_rows(job: Any) -> None:
        x, out, n_units, unit, unit_bytes = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
        )
        token = take_task(job)
        while token < job[N_TASKS]:
            first, size = tile_of(token, job[N_TASKS], most)
            place, tile = token - first, out + first * n_units * unit_bytes
            for i in range(n_units):
                header = tile + i * size * unit_bytes
                steps = header + size * X_HEADER_BYTES + place * X_STEP_BYTES
                columns = x + (token * n_units + i) * unit * 4
                round_unit(bits, columns, unit, header + place * X_HEADER_BYTES, steps, size * X_STEP_BYTES)
            token = take_task(job)

    return round_rows


def _matmul_kernel(kind: str) -> Code:
    """A task is a share of the weight's blocks of 16 rows, for all tokens: tile by tile, then what is left over."""
    from quant.kernels.cpu.inline import inlined, njit, read, take_task

    tile_of, multiply_tile = njit(_tile_of), inlined(emit_tile, n_constants=2)
    most = Kind.named(kind).isa.tokens
    half = most // 2

    def multiply(job: Any) -> None:
        weights, block_bytes, n_blocks, starts = (
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
            first, stop = read(starts + 8 * task), read(starts + 8 * task + 8)
            while first < stop:
                token = 0
                while token < n_tokens:
                    _, size = tile_of(token, n_tokens, most)
                    tile = x + token * x_stride
                    for block in range(first, min(first + BLOCKS_AT_ONCE, stop)):
                        w, out = weights + block * block_bytes, y + token * y_stride + block * ROWS * 4
                        if size == most:
                            multiply_tile(kind, most, w, tile, out, y_stride, n_units, n_steps)
                        elif size == half:
                            multiply_tile(kind, half, w, tile, out, y_stride, n_units, n_steps)
                        else:
                            multiply_tile(kind, 1, w, tile, out, y_stride, n_units, n_steps)
                    token += size
                first += BLOCKS_AT_ONCE
            task = take_task(job)

    return multiply
