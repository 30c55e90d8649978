"""Products of a few rows of activations with a dense weight, and rows of an embedding, in the type they are kept in.

A product streams the weight once; float16 and bfloat16 are widened in registers, so that it takes half the time of
float32 and no copy. Everything is summed in float32.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from mistralcli.kernels.cpu.attention import digest
from mistralcli.kernels.cpu.floats import BYTES, NUMBERS, is_known, load, total, width_of
from quant.kernels.cpu import pool
from quant.kernels.cpu.inline import inlined, read
from quant.kernels.cpu.isa import chosen
from quant.kernels.cpu.matmul import WORTH_A_THREAD
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job, take_task
from quant.kernels.cpu.tile import PREFETCH_BYTES
from quant.kernels.cpu.vectors import F32, I64, Vectors
from quant.ops import TILE_WEIGHTS

F64 = ir.DoubleType()

FEW_ROWS = 8
"""Rows of activations up to which a product is as fast as the weight is read, about."""

ROWS = 4
"""Rows of a weight that are multiplied side by side, so that sums need not wait for one another."""

TASK_BYTES = 1 << 16
"""Of a weight in a task, about: 5 µs."""


def emit_rows(
    builder: ir.IRBuilder,
    numbers: str,
    n_rows: int,
    width: int,
    weight: ir.Value,
    x: ir.Value,
    y: ir.Value,
    dim: ir.Value,
) -> None:
    """y (n_rows,) = weight (n_rows, dim) x; x (dim,) and y are float32."""
    v = Vectors(builder, width)
    row_bytes = builder.mul(dim, I64(BYTES[numbers]))

    def add(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, column, *sums = carried
        values = v.load(v.floats, column)
        for i in range(n_rows):
            row = builder.add(at, builder.mul(row_bytes, I64(i)))
            v.prefetch(row, PREFETCH_BYTES)
            sums[i] = v.multiply_add(load(v, numbers, row), values, sums[i])
        return [v.offset(at, width * BYTES[numbers]), v.offset(column, 4 * width), *sums]

    zeros = [v.constant(v.floats, 0.0)] * n_rows
    _, _, *sums = v.loop(builder.sdiv(dim, I64(width)), [weight, x, *zeros], add)
    for i, one in enumerate(sums):
        v.store(total(v, one), y, 4 * i)


def emit_widen(
    builder: ir.IRBuilder, numbers: str, width: int, row: ir.Value, out: ir.Value, n: ir.Value
) -> None:
    """out = row, n float32."""
    v = Vectors(builder, width)

    def copy(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, to = carried
        v.store(load(v, numbers, at), to)
        return [v.offset(at, width * BYTES[numbers]), v.offset(to, 4 * width)]

    v.loop(builder.sdiv(n, I64(width)), [row, out], copy)


def emit_angles(
    builder: ir.IRBuilder,
    position: ir.Value,
    frequencies: ir.Value,
    n: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
) -> None:
    """cos and sin (n,) float32 of the position times frequencies (n,) float64, computed in float64."""
    v = Vectors(builder, 1)
    place, kind = builder.sitofp(position, F64), ir.FunctionType(F64, [F64])
    functions = [builder.module.declare_intrinsic(f"llvm.{name}.f64", fnty=kind) for name in ("cos", "sin")]

    def turn(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at, *to = carried
        angle = builder.fmul(place, v.load(F64, at))
        for function, out in zip(functions, to, strict=True):
            v.store(builder.fptrunc(builder.call(function, [angle]), F32), out)
        return [v.offset(at, 8), *(v.offset(one, 4) for one in to)]

    v.loop(n, [frequencies, cos, sin], turn)


multiply_rows, widen_row, write_angles = (
    inlined(emit, n_constants) for emit, n_constants in ((emit_rows, 3), (emit_widen, 2), (emit_angles, 0))
)
"""The same for numba."""


@functools.cache
def _product_kernel(numbers: str, width: int, version: str) -> int:
    """A task is some rows of the weight, for all tokens."""
    row_bytes = BYTES[numbers]

    def multiply(job: Any) -> None:
        assert version
        weight, x, y, y_bytes, dim, n_rows, n_tokens, per_task = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
            job[ARGUMENTS + 7],
        )
        task = take_task(job)
        while task < job[N_TASKS]:
            row, stop = task * per_task, min((task + 1) * per_task, n_rows)
            while row < stop:
                several = row + ROWS <= stop
                for token in range(n_tokens):
                    w, columns = weight + row * dim * row_bytes, x + token * dim * 4
                    out = y + token * y_bytes + row * 4
                    if several:
                        multiply_rows(numbers, ROWS, width, w, columns, out, dim)
                    else:
                        multiply_rows(numbers, 1, width, w, columns, out, dim)
                row += ROWS if several else 1
            task = take_task(job)

    return pool.kernel(multiply)


@functools.cache
def _embedding_kernel(numbers: str, width: int, version: str) -> int:
    """A task is a sequence."""
    element = BYTES[numbers]

    def embed(job: Any) -> None:
        assert version
        token_ids, positions, table, dim, h = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
        )
        frequencies, half, cos, sin = (
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
            job[ARGUMENTS + 7],
            job[ARGUMENTS + 8],
        )
        seq = take_task(job)
        while seq < job[N_TASKS]:
            row = table + read(token_ids + 8 * seq) * dim * element
            widen_row(numbers, width, row, h + seq * dim * 4, dim)
            angles = seq * half * 4
            write_angles(read(positions + 8 * seq), frequencies, half, cos + angles, sin + angles)
            seq = take_task(job)

    return pool.kernel(embed)


def product_job(weight: torch.Tensor, x: int, y: tuple[int, int], n_tokens: int) -> Job:
    """y = x weightᵀ: x the address of (n_tokens, dim) float32, y an address and bytes from token to token."""
    n_rows, dim = weight.shape
    per_task = max(1, TASK_BYTES // (dim * weight.itemsize * ROWS)) * ROWS
    kernel = _product_kernel(NUMBERS[weight.dtype], width_of(dim), f"{chosen().name} {digest()}")
    return Job(kernel, -(-n_rows // per_task), (weight.data_ptr(), x, *y, dim, n_rows, n_tokens, per_task))


def embedding_job(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    frequencies: torch.Tensor,
    h: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Job:
    """The rows of the table to h (n_seqs, dim), and cos and sin (n_seqs, head_dim / 2) of the positions.

    token_ids, positions: (n_seqs,) int64; frequencies (head_dim / 2,) float64; the rest float32.
    """
    dim, half = table.shape[1], len(frequencies)
    kernel = _embedding_kernel(NUMBERS[table.dtype], width_of(dim), f"{chosen().name} {digest()}")
    addresses = [one.data_ptr() for one in (token_ids, positions, table, h, frequencies, cos, sin)]
    ids, places, rows, out, angles, c, s = addresses
    return Job(kernel, len(token_ids), (ids, places, rows, dim, out, angles, half, c, s))


def tied_logits(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `mistralcli.ops.tied_logits`; many rows are left to PyTorch, which takes the table a tile at a time."""
    rows = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
    n_tokens, vocab_size = len(rows), len(table)
    y = torch.empty(n_tokens, vocab_size)
    if n_tokens <= FEW_ROWS and is_known(table.dtype):
        job = product_job(table, rows.data_ptr(), (y.data_ptr(), 4 * vocab_size), n_tokens)
        pool.run(job, torch.get_num_threads() if table.nbytes > WORTH_A_THREAD else 1)
    else:
        tile = max(1, TILE_WEIGHTS // table.shape[1])
        for start in range(0, vocab_size, tile):
            y[:, start : start + tile] = rows @ table[start : start + tile].float().T
    return y.view(*hidden.shape[:-1], vocab_size)
