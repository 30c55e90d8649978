"""Products of a few rows of activations with a dense weight, and rows of an embedding, in the type they are kept in.

A product streams the weight once; float16 and bfloat16 are widened in registers, so that it takes half the time of
float32 and no copy. Everything is summed in float32.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from mistralcli.kernels.cpu.attention import PLACE_BYTES
from mistralcli.kernels.cpu.floats import (
    BYTES,
    NUMBERS,
    accumulators,
    is_known,
    load,
    total,
    totals,
    width_of,
)
from quant.kernels.cpu import pool
from quant.kernels.cpu.machine_code import Code, kernel
from quant.kernels.cpu.matmul import WORTH_A_THREAD
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job
from quant.kernels.cpu.shares import starts_of_shares
from quant.kernels.cpu.vectors import F32, I64, Vectors
from quant.ops import TILE_WEIGHTS

F64 = ir.DoubleType()

FEW_ROWS = 8
"""Rows of activations up to which a product is as fast as the weight is read, about."""

ROWS = 4
"""Rows of a weight that are multiplied side by side, so that sums need not wait for one another."""

TASK_BYTES = 1 << 16
"""Of a weight in the shortest task, about: 5 µs."""


def emit_rows(
    builder: ir.IRBuilder,
    numbers: str,
    n_rows: int,
    n_tokens: int,
    width: int,
    weight: ir.Value,
    x: ir.Value,
    y: ir.Value,
    y_bytes: ir.Value,
    dim: ir.Value,
) -> None:
    """y (n_tokens, n_rows) = x weightᵀ; x (n_tokens, dim) and y are float32, y's tokens y_bytes apart.

    Every number is summed alike, however many tokens there are.
    """
    v = Vectors(builder, width)
    at_once = min(n_rows, accumulators(width) // n_tokens)
    row_bytes, x_bytes = builder.mul(dim, I64(BYTES[numbers])), builder.mul(dim, I64(4))
    columns = [builder.add(x, builder.mul(x_bytes, I64(token))) for token in range(n_tokens)]
    for first in range(0, n_rows, at_once):
        rows = [builder.add(weight, builder.mul(row_bytes, I64(first + i))) for i in range(at_once)]
        sums = _tile_sums(v, numbers, rows, columns, dim)
        if len(sums) == width:
            together = totals(v, sums)
        for token in range(n_tokens):
            to = builder.add(y, builder.mul(y_bytes, I64(token)))
            own = range(token * at_once, (token + 1) * at_once)
            if len(sums) == width:
                v.store(v.shuffle(together, own), to, 4 * first)
            else:
                for i in range(at_once):
                    v.store(total(v, sums[own[i]]), to, 4 * (first + i))


def _tile_sums(
    v: Vectors, numbers: str, rows: Sequence[ir.Value], columns: Sequence[ir.Value], dim: ir.Value
) -> list[ir.Value]:
    """Vectors of partial sums of the products of every token with every row of a weight, token by token."""
    n_rows = len(rows)

    def add(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        weight_at, x_at, *sums = carried
        weights = []
        for row in rows:
            at = v.builder.add(row, weight_at)
            v.prefetch(at)
            weights.append(load(v, numbers, at))
        for token, column in enumerate(columns):
            values = v.load(v.floats, v.builder.add(column, x_at))
            for i, weight in enumerate(weights):
                sums[token * n_rows + i] = v.multiply_add(weight, values, sums[token * n_rows + i])
        return [v.offset(weight_at, v.lanes * BYTES[numbers]), v.offset(x_at, 4 * v.lanes), *sums]

    zeros = [v.constant(v.floats, 0.0)] * (n_rows * len(columns))
    _, _, *sums = v.loop(v.builder.sdiv(dim, I64(v.lanes)), [I64(0), I64(0), *zeros], add)
    return sums


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


def _product_kernel(numbers: str, width: int) -> Code:
    """A task is a share of the weight's rows, for all tokens: as many as fit into a tile, half as many, and so on."""
    from quant.kernels.cpu.inline import inlined, read, take_task

    multiply_rows = inlined(emit_rows, n_constants=4)
    row_bytes, most = BYTES[numbers], accumulators(width) // 2
    half, quarter = most // 2, most // 4

    def multiply(job: Any) -> None:
        weight, x, y, y_bytes, dim, n_rows, n_tokens, starts = (
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
            row, stop = read(starts + 8 * task) * ROWS, min(read(starts + 8 * task + 8) * ROWS, n_rows)
            while row < stop:
                several, token = row + ROWS <= stop, 0
                w = weight + row * dim * row_bytes
                while token < n_tokens:
                    columns, out, left = x + token * dim * 4, y + token * y_bytes + row * 4, n_tokens - token
                    if not several:
                        multiply_rows(numbers, 1, 1, width, w, columns, out, y_bytes, dim)
                        token += 1
                    elif left >= most:
                        multiply_rows(numbers, ROWS, most, width, w, columns, out, y_bytes, dim)
                        token += most
                    elif left >= half:
                        multiply_rows(numbers, ROWS, half, width, w, columns, out, y_bytes, dim)
                        token += half
                    elif left >= quarter:
                        multiply_rows(numbers, ROWS, quarter, width, w, columns, out, y_bytes, dim)
                        token += quarter
                    else:
                        multiply_rows(numbers, ROWS, 1, width, w, columns, out, y_bytes, dim)
                        token += 1
                row += ROWS if several else 1
            task = take_task(job)

    return multiply


def _embedding_kernel(numbers: str, width: int) -> Code:
    """A task is a token."""
    from quant.kernels.cpu.inline import inlined, read, take_task

    widen_row, write_angles = inlined(emit_widen, n_constants=2), inlined(emit_angles, n_constants=0)
    element = BYTES[numbers]

    def embed(job: Any) -> None:
        token_ids, places, table, dim, h = (
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
        token = take_task(job)
        while token < job[N_TASKS]:
            row = table + read(token_ids + 8 * token) * dim * element
            widen_row(numbers, width, row, h + token * dim * 4, dim)
            position, angles = read(places + token * PLACE_BYTES), token * half * 4
            write_angles(position, frequencies, half, cos + angles, sin + angles)
            token = take_task(job)

    return embed


def product_job(weight: torch.Tensor, x: int, y: tuple[int, int], n_tokens: int, n_threads: int) -> Job:
    """y = x weightᵀ: x the address of (n_tokens, dim) float32, y an address and bytes from token to token.

    The weight is shared out for n_threads, which need not be as many as run it.
    """
    n_rows, dim = weight.shape
    least = max(1, TASK_BYTES // (dim * weight.itemsize * ROWS))
    starts = starts_of_shares(-(-n_rows // ROWS), least, n_threads)
    arguments = (weight.data_ptr(), x, *y, dim, n_rows, n_tokens, ctypes.addressof(starts))
    compiled = kernel(_product_kernel, NUMBERS[weight.dtype], width_of(dim))
    return Job(compiled, len(starts) - 1, arguments)


def embedding_job(
    n_tokens: int,
    token_ids: torch.Tensor,
    places: torch.Tensor,
    table: torch.Tensor,
    frequencies: torch.Tensor,
    h: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Job:
    """The rows of the table to h (n_tokens, dim), and cos and sin (n_tokens, head_dim / 2) of the positions.

    token_ids: (n_tokens,) int64; places: (n_tokens, 3) int64, as of `attention.places`; frequencies (head_dim / 2,)
    float64; the rest float32. All may be longer.
    """
    dim, half = table.shape[1], len(frequencies)
    compiled = kernel(_embedding_kernel, NUMBERS[table.dtype], width_of(dim))
    addresses = [one.data_ptr() for one in (token_ids, places, table, h, frequencies, cos, sin)]
    ids, where, rows, out, angles, c, s = addresses
    return Job(compiled, n_tokens, (ids, where, rows, dim, out, angles, half, c, s))


def tied_logits(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `mistralcli.ops.tied_logits`; many rows are left to PyTorch, which takes the table a tile at a time."""
    rows = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
    n_tokens, vocab_size = len(rows), len(table)
    y = torch.empty(n_tokens, vocab_size)
    if n_tokens <= FEW_ROWS and is_known(table.dtype):
        n_threads = torch.get_num_threads() if table.nbytes > WORTH_A_THREAD else 1
        job = product_job(table, rows.data_ptr(), (y.data_ptr(), 4 * vocab_size), n_tokens, n_threads)
        pool.run(job, n_threads)
    else:
        tile = max(1, TILE_WEIGHTS // table.shape[1])
        for start in range(0, vocab_size, tile):
            y[:, start : start + tile] = rows @ table[start : start + tile].float().T
    return y.view(*hidden.shape[:-1], vocab_size)
