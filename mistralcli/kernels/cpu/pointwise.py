"""What lies between the matmuls: RMSNorm with the residual sum in front, SwiGLU, rotary, the write into the ring.

Rows are float32, of lengths that the machine's vectors divide or narrower vectors do (`floats.width_of`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from mistralcli.cache import Seen
from mistralcli.cache import write_ring as reference_write_ring
from mistralcli.kernels.cpu.attention import PLACE_BYTES, places
from mistralcli.kernels.cpu.floats import BYTES, NUMBERS, exp, is_known, largest, store, total, width_of
from quant.kernels.cpu import pool
from quant.kernels.cpu.machine_code import Code, kernel
from quant.kernels.cpu.matmul import WORTH_A_THREAD
from quant.kernels.cpu.pool import ARGUMENTS, N_TASKS, Job
from quant.kernels.cpu.vectors import F32, I64, Vectors

SWIGLU_TASK = 4096
"""Elements of a task of SwiGLU, 2 µs."""


def emit_norm(
    builder: ir.IRBuilder,
    width: int,
    h: ir.Value,
    added: ir.Value,
    weight: ir.Value,
    eps: ir.Value,
    out: ir.Value,
    dim: ir.Value,
) -> None:
    """h += added, unless that address is 0; out = RMSNorm of h. All (dim,) float32, eps at its address too."""
    v = Vectors(builder, width)
    n, step = builder.sdiv(dim, I64(width)), 4 * width
    # Without anything to add, h is read for it and what was read counts as zeros.
    adds = builder.icmp_signed("!=", added, I64(0))
    other = builder.select(adds, added, h)

    def add(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        own, at, squares = carried
        value = v.load(v.floats, own)
        more = builder.select(adds, v.load(v.floats, at), v.constant(v.floats, 0.0))
        value = builder.fadd(value, more)
        v.store(value, own)
        return [v.offset(own, step), v.offset(at, step), v.multiply_add(value, value, squares)]

    _, _, squares = v.loop(n, [h, other, v.constant(v.floats, 0.0)], add)
    mean = builder.fdiv(total(v, squares), builder.sitofp(dim, F32))
    kind = ir.FunctionType(F32, [F32])
    root = builder.module.declare_intrinsic("llvm.sqrt.f32", fnty=kind)
    scale = builder.fdiv(F32(1.0), builder.call(root, [builder.fadd(mean, v.load(F32, eps))]))
    scales = v.splat(scale)

    def write(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        own, by, to = carried
        value = builder.fmul(builder.fmul(v.load(v.floats, own), scales), v.load(v.floats, by))
        v.store(value, to)
        return [v.offset(one, step) for one in (own, by, to)]

    v.loop(n, [h, weight, out], write)


def emit_swiglu(
    builder: ir.IRBuilder, width: int, gate: ir.Value, up: ir.Value, out: ir.Value, n: ir.Value
) -> None:
    """out = silu(gate) · up, n float32 each."""
    v = Vectors(builder, width)

    def write(carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        g, u, to = carried
        value, one = v.load(v.floats, g), v.constant(v.floats, 1.0)
        # Below −87, exp would be infinite: silu is below 1e-36 there.
        low = v.constant(v.floats, -87.0)
        held = builder.select(builder.fcmp_ordered("<", value, low), low, value)
        divisor = builder.fadd(one, exp(v, builder.fsub(v.constant(v.floats, 0.0), held)))
        v.store(builder.fmul(builder.fdiv(value, divisor), v.load(v.floats, u)), to)
        return [v.offset(address, 4 * width) for address in (g, u, to)]

    v.loop(builder.sdiv(n, I64(width)), [gate, up, out], write)


def emit_rotate(
    builder: ir.IRBuilder, head_dim: int, x: ir.Value, cos: ir.Value, sin: ir.Value, out: ir.Value
) -> None:
    """Rotate x (head_dim,) float32 by angles whose cos and sin (head_dim / 2,) are given; out may be x."""
    half = head_dim // 2
    v = Vectors(builder, width_of(half))
    for at in range(0, 4 * half, 4 * v.lanes):
        first, second = (v.load(v.floats, x, at + 4 * half * part) for part in (0, 1))
        c, s = (v.load(v.floats, table, at) for table in (cos, sin))
        crossed = (builder.fneg(builder.fmul(second, s)), builder.fmul(first, s))
        v.store(v.multiply_add(first, c, crossed[0]), out, at)
        v.store(v.multiply_add(second, c, crossed[1]), out, at + 4 * half)


def emit_keep(
    builder: ir.IRBuilder, numbers: str, head_dim: int, x: ir.Value, slot: ir.Value, scale: ir.Value
) -> None:
    """Store x (head_dim,) float32 in a slot of the ring: as `mistralcli.cache.quantized` where `numbers` is "i8"."""
    v = Vectors(builder, width_of(head_dim))
    values = [v.load(v.floats, x, 4 * at) for at in range(0, head_dim, v.lanes)]
    if numbers == "i8":
        values = _quantized(v, values, scale)
    for i, value in enumerate(values):
        store(v, numbers, value, slot, i * v.lanes * BYTES[numbers])


def _quantized(v: Vectors, values: Sequence[ir.Value], scale_address: ir.Value) -> list[ir.Value]:
    builder, zero = v.builder, v.constant(v.floats, 0.0)
    most, spoilt = zero, zero
    for value in values:
        magnitude = v.call(f"llvm.fabs.v{v.lanes}f32", v.floats, [value])
        most = builder.select(builder.fcmp_ordered(">", magnitude, most), magnitude, most)
        spoilt = builder.fadd(spoilt, builder.fmul(value, zero))  # NaN where a value is not finite
    highest = largest(v, most)
    highest = builder.select(builder.fcmp_ordered(">", highest, F32(1e-30)), highest, F32(1e-30))
    scale = builder.fdiv(highest, F32(127.0))
    v.store(builder.fadd(scale, total(v, spoilt)), scale_address)
    return [builder.fdiv(value, v.splat(scale)) for value in values]


def _norm_kernel(width: int) -> Code:
    """A task is a token."""
    from quant.kernels.cpu.inline import inlined, take_task

    norm_row = inlined(emit_norm, n_constants=1)

    def norm(job: Any) -> None:
        h, added, added_bytes, weight, eps, out, dim = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
        )
        token = take_task(job)
        while token < job[N_TASKS]:
            other = added + token * added_bytes if added else 0
            norm_row(width, h + token * dim * 4, other, weight, eps, out + token * dim * 4, dim)
            token = take_task(job)

    return norm


def _swiglu_kernel(width: int) -> Code:
    """A task is some columns of a token."""
    from quant.kernels.cpu.inline import inlined, take_task

    swiglu_some = inlined(emit_swiglu, n_constants=1)

    def swiglu(job: Any) -> None:
        gate, up, row_bytes, out, hidden_dim, per_task = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
        )
        per_token = -(-hidden_dim // per_task)
        task = take_task(job)
        while task < job[N_TASKS]:
            token, first = task // per_token, task % per_token * per_task
            at, to = token * row_bytes + first * 4, (token * hidden_dim + first) * 4
            swiglu_some(width, gate + at, up + at, out + to, min(per_task, hidden_dim - first))
            task = take_task(job)

    return swiglu


def _rotary_kernel(head_dim: int) -> Code:
    """A task is a token."""
    from quant.kernels.cpu.inline import inlined, take_task

    rotate_head = inlined(emit_rotate, n_constants=1)

    def rotate(job: Any) -> None:
        x, x_bytes, cos, sin, out, out_bytes, n_heads = (
            job[ARGUMENTS],
            job[ARGUMENTS + 1],
            job[ARGUMENTS + 2],
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
        )
        token = take_task(job)
        while token < job[N_TASKS]:
            angles = token * (head_dim // 2) * 4
            for head in range(n_heads):
                at, to = x + token * x_bytes, out + token * out_bytes
                offset = head * head_dim * 4
                rotate_head(head_dim, at + offset, cos + angles, sin + angles, to + offset)
            token = take_task(job)

    return rotate


def _writing_kernel(numbers: str, head_dim: int) -> Code:
    """A task is a key head of a token."""
    from quant.kernels.cpu.inline import inlined, read, take_task

    keep_head = inlined(emit_keep, n_constants=2)

    def write(job: Any) -> None:
        x, x_bytes, places = job[ARGUMENTS], job[ARGUMENTS + 1], job[ARGUMENTS + 2]
        buffer, scales, seq_slots, head_slots, slot_bytes = (
            job[ARGUMENTS + 3],
            job[ARGUMENTS + 4],
            job[ARGUMENTS + 5],
            job[ARGUMENTS + 6],
            job[ARGUMENTS + 7],
        )
        capacity, n_kv_heads = job[ARGUMENTS + 8], job[ARGUMENTS + 9]
        task = take_task(job)
        while task < job[N_TASKS]:
            token, head = task // n_kv_heads, task % n_kv_heads
            place = places + token * PLACE_BYTES
            position = read(place)
            if position >= 0:
                slot = read(place + 8) * seq_slots + head * head_slots + position % capacity
                row = x + token * x_bytes + head * head_dim * 4
                keep_head(numbers, head_dim, row, buffer + slot * slot_bytes, scales + slot * 4)
            task = take_task(job)

    return write


def norm_job(
    h: int, added: tuple[int, int] | None, weight: torch.Tensor, eps: torch.Tensor, out: int, n_tokens: int
) -> Job:
    """RMSNorm of the rows at the address h, to which those at `added` (an address, bytes from row to row) are added.

    weight (dim,) and eps (1,) are float32; h and out are addresses of (n_tokens, dim) float32.
    """
    dim = len(weight)
    arguments = (h, *(added or (0, 0)), weight.data_ptr(), eps.data_ptr(), out, dim)
    return Job(kernel(_norm_kernel, width_of(dim)), n_tokens, arguments)


def swiglu_job(gate: int, up: int, row_bytes: int, out: int, n_tokens: int, hidden_dim: int) -> Job:
    """SwiGLU of rows of hidden_dim float32, gate's and up's `row_bytes` apart, to rows that are not."""
    width = width_of(hidden_dim)
    per_task = min(hidden_dim, SWIGLU_TASK)
    per_task = per_task if per_task % width == 0 else hidden_dim
    arguments = (gate, up, row_bytes, out, hidden_dim, per_task)
    return Job(kernel(_swiglu_kernel, width), n_tokens * -(-hidden_dim // per_task), arguments)


def rotary_job(
    x: tuple[int, int], cos: int, sin: int, out: tuple[int, int], n_tokens: int, n_heads: int, head_dim: int
) -> Job:
    """Rotate heads; x and out, which may be the same, are an address and bytes from token to token."""
    arguments = (*x, cos, sin, *out, n_heads)
    return Job(kernel(_rotary_kernel, head_dim), n_tokens, arguments)


def writing_job(
    x: tuple[int, int],
    places: int,
    n_tokens: int,
    buffer: torch.Tensor,
    scales: torch.Tensor | None,
    capacity: int,
) -> Job:
    """Write heads of n_tokens tokens to the ring; buffer and scales as `write_ring` takes them.

    places: the address of (n_tokens, 3) int64, as of `attention.places`.
    """
    _, n_kv_heads, _, head_dim = buffer.shape
    arguments = (
        *(*x, places, buffer.data_ptr(), 0 if scales is None else scales.data_ptr()),
        *(buffer.stride(0) // head_dim, buffer.stride(1) // head_dim, head_dim * buffer.itemsize),
        *(capacity, n_kv_heads),
    )
    compiled = kernel(_writing_kernel, NUMBERS[buffer.dtype], head_dim)
    return Job(compiled, n_tokens * n_kv_heads, arguments)


def _run(job: Job, n_bytes: int) -> None:
    pool.run(job, torch.get_num_threads() if n_bytes > WORTH_A_THREAD else 1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `mistralcli.ops.rms_norm`."""
    rows = x.float().contiguous()
    out, dim = torch.empty_like(rows), rows.shape[-1]
    wide, epsilon = weight.float(), torch.tensor([eps])
    job = norm_job(rows.data_ptr(), None, wide, epsilon, out.data_ptr(), rows.numel() // dim)
    _run(job, rows.nbytes)
    return out.to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `mistralcli.ops.swiglu`."""
    wide, other = gate.float().contiguous(), up.float().contiguous()
    out, hidden_dim = torch.empty_like(wide), wide.shape[-1]
    n_tokens = wide.numel() // hidden_dim
    job = swiglu_job(wide.data_ptr(), other.data_ptr(), 4 * hidden_dim, out.data_ptr(), n_tokens, hidden_dim)
    _run(job, wide.nbytes)
    return out.to(gate.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `mistralcli.ops.apply_rotary`."""
    rows, (cos, sin) = x.float().contiguous(), (table.contiguous() for table in (cos, sin))
    out, (n_seqs, n_tokens, n_heads, head_dim) = torch.empty_like(rows), x.shape
    places = [(one.data_ptr(), 4 * n_heads * head_dim) for one in (rows, out)]
    job = rotary_job(
        places[0], cos.data_ptr(), sin.data_ptr(), places[1], n_seqs * n_tokens, n_heads, head_dim
    )
    _run(job, rows.nbytes)
    return out.to(x.dtype)


def write_ring(
    buffer: torch.Tensor, x: torch.Tensor, seen: Seen, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """See `mistralcli.cache.write_ring`."""
    if not is_known(buffer.dtype):
        return reference_write_ring.reference(buffer, x, seen, scales)
    rows, where = x.float().contiguous(), places(seen)
    place = (rows.data_ptr(), 4 * rows.shape[2] * rows.shape[3])
    job = writing_job(place, where.data_ptr(), len(where), buffer, scales, seen.ring.capacity)
    _run(job, rows.nbytes)
    return buffer
