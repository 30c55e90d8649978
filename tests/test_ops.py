"""The reference operators, and every kernel against its reference."""

import math
from itertools import product
from typing import Any

import pytest
import torch

import mistralcli.ops
import quant.ops
from mistralcli.cache import Ring, Seen
from mistralcli.ops import apply_rotary, attention, rms_norm, rotary_tables, swiglu
from quant.kernels.cpu.layout import interleave
from quant.registry import Op, all_ops, op


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_its_formula_and_computes_in_float32() -> None:
    x, weight = randn(3, 5, 8), randn(8, seed=1)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=1e-6, rtol=1e-6)
    large = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square overflows float16
    assert rms_norm(large, torch.ones(8, dtype=torch.float16), 1e-5).tolist() == [[1.0] * 8]


def test_rotary_scores_depend_on_the_distance_alone_even_at_position_128k() -> None:
    q, k = randn(1, 1, 1, 64), randn(1, 1, 1, 64, seed=1)

    def score(at: int) -> float:
        cos, sin = rotary_tables(torch.tensor([[at]]), 64, 1e4)
        cos_back, sin_back = rotary_tables(torch.tensor([[at - 5]]), 64, 1e4)
        return float((apply_rotary(q, cos, sin) * apply_rotary(k, cos_back, sin_back)).sum())

    assert score(131_071) == pytest.approx(score(5), abs=1e-4)
    assert score(5) != pytest.approx(float((q * k).sum()), abs=1e-2)


def test_rotary_rotates_pairs_half_a_head_apart() -> None:
    cos, sin = rotary_tables(torch.tensor([[1]]), 4, 100.0)
    out = apply_rotary(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), cos, sin).flatten().tolist()
    angles = [1.0, 0.1]
    expected = [
        1 * math.cos(angles[0]) - 3 * math.sin(angles[0]),
        2 * math.cos(angles[1]) - 4 * math.sin(angles[1]),
    ]
    expected += [
        3 * math.cos(angles[0]) + 1 * math.sin(angles[0]),
        4 * math.cos(angles[1]) + 2 * math.sin(angles[1]),
    ]
    assert out == pytest.approx(expected, abs=1e-6)


def test_attention_is_softmax_over_what_is_seen_and_zero_where_nothing_is() -> None:
    q, k, v = randn(1, 2, 3, 4), randn(1, 1, 5, 4, seed=1), randn(1, 1, 5, 4, seed=2)
    # Slots 0 … 4 hold the positions 5, 6, 2, 3, 4; position 5 sees 4 and 5, position 6 sees 5 and 6.
    out = attention.reference(q, k, v, Seen(torch.tensor([[5, 6, -1]]), Ring(5, 2), 5))
    assert torch.equal(out[0, :, 2], torch.zeros(2, 4))
    for token, slots in ((0, [4, 0]), (1, [0, 1])):
        weights = (q[0, 1, token] @ k[0, 0, slots].T / 2).softmax(-1)
        torch.testing.assert_close(out[0, 1, token], weights @ v[0, 0, slots])
    alone = attention.reference(q, k, v, Seen(torch.tensor([[0, 1, 2]]), Ring(5, None), 5))
    torch.testing.assert_close(alone[0, :, 0], v[0, :, 0].expand(2, 4))


def test_swiglu_is_silu_of_the_gate_times_up() -> None:
    gate, up = randn(2, 7), randn(2, 7, seed=1)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def attention_case(
    n_heads: int, n_kv_heads: int, n_tokens: int, start: int, window: int | None, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Two sequences, the second of which has padding from its middle on, in a ring that is full or has wrapped."""
    ring = Ring.of(window, max_seq_len=300, slack=n_tokens)
    positions = torch.arange(start, start + n_tokens).repeat(2, 1)
    positions[1, n_tokens // 2 :] = -1
    seen = Seen(positions, ring, min(start + n_tokens, ring.capacity))
    q, k, v = (
        randn(2, n_heads, n_tokens, 24),
        randn(2, n_kv_heads, seen.n_slots, 24),
        randn(2, n_kv_heads, seen.n_slots, 24, seed=5),
    )
    return q.to(dtype), k.to(dtype), v.to(dtype), seen


def matmul_cases(bits: int) -> list[tuple[Any, ...]]:
    """Many rows, few rows and one, of all that the kernels tell apart."""
    cases = []
    for n_rows, dtype, symmetric in product((40, 3, 1), (torch.bfloat16, torch.float16), (True, False)):
        shape = (96, 4)
        zeros = None if symmetric else torch.full(shape, -2, dtype=torch.int8)
        codes = torch.arange(96 * 128 * bits // 8).mul(31).to(torch.uint8).view(96, -1)
        scales = randn(*shape, seed=3).abs().add(0.5).mul(0.1 / 2**bits).to(dtype)
        cases.append((randn(n_rows, 128).to(dtype), codes, scales, zeros))
    return cases


def whole_numbers(x: torch.Tensor) -> torch.Tensor:
    """Activations of about the same size that rounding to 8 bits leaves as they are: k / 64, up to 127 / 64."""
    whole = (x.float() * 32).round().clamp(-127, 127)
    whole[:, ::32] = 127
    return (whole / 64).to(x.dtype)


CASES = {
    "mistralcli.ops:rms_norm": [
        (randn(3, 5, dim).to(dtype), randn(dim, seed=1).to(dtype), 1e-5)
        for dim in (48, 384, 1000)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    "mistralcli.ops:apply_rotary": [
        (randn(2, 7, n_heads, head_dim).to(dtype), *rotary_tables(torch.arange(14).view(2, 7), head_dim, 1e4))
        for n_heads, head_dim in ((3, 16), (4, 24))
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "mistralcli.ops:swiglu": [
        (randn(3, 501).to(dtype), randn(3, 501, seed=1).to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "mistralcli.ops:tied_logits": [
        (randn(n_rows, 48), randn(37, 48, seed=1).div(7).to(dtype))
        for n_rows in (1, 20)
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "mistralcli.cache:write_ring": [
        (torch.zeros(2, 3, 20, 24), randn(2, 7, 5, 24)[:, :, :3].to(dtype), Seen(positions, Ring(20, 9), 20))
        for positions in (torch.tensor([[16, 17, 18, 19, 20, 21, 22], [3, 4, -1, -1, -1, -1, -1]]),)
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "quant.ops:int4_matmul": matmul_cases(4),
    "quant.ops:int8_matmul": matmul_cases(8),
    "quant.ops:interleaved_matmul": [
        (whole_numbers(x), interleave(*stored, x.shape[-1], bits))
        for bits in (4, 8)
        for x, *stored in matmul_cases(bits)
    ],
    "mistralcli.ops:attention": [
        attention_case(n_heads, n_kv_heads, n_tokens, start, window, dtype)
        for n_heads, n_kv_heads in ((4, 4), (6, 2), (3, 1))
        for n_tokens, start, window in (
            (1, 0, None),
            (1, 36, None),
            (5, 28, 9),
            (130, 127, 31),
            (130, 127, None),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
}
"""Arguments for every operator that has a kernel on this machine."""

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""int4 with few rows rounds activations to 8 bits, here an error of 0.6 % of outputs of about 0.5."""


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def kernels() -> list[tuple[str, str]]:
    assert mistralcli.ops and quant.ops  # importing them registers their operators
    return [
        (name, device) for name, one in all_ops().items() for device in devices() if device in one.kernels
    ]


def on_device(case: tuple[Any, ...], device: str) -> list[Any]:
    """A copy of the arguments: some operators write."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in case]
    return [a.to(device) if isinstance(a, torch.Tensor | Seen) else a for a in copies]


@pytest.mark.parametrize(("name", "device"), kernels())
def test_every_kernel_agrees_with_its_reference(name: str, device: str) -> None:
    one = all_ops()[name]
    for case in CASES[name]:
        expected, out = (run(*on_device(case, device)) for run in (one.reference, one.on(device)))
        assert isinstance(expected, torch.Tensor) and isinstance(out, torch.Tensor)
        tolerance = TOLERANCE[out.dtype]
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Op(attention.reference, attention.kernels)
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")
    assert made.on("cpu") is attention.reference
    monkeypatch.delenv("MISTRAL_CLI_KERNELS")
    assert Op(attention.reference, attention.kernels).on("cpu") is not attention.reference


def test_a_device_without_a_kernel_runs_the_reference() -> None:
    @op(cuda="no.such.module:kernel")
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    try:
        assert double(torch.ones(1)).item() == 2
        with pytest.raises(ImportError):
            double.on("cuda")
    finally:
        del all_ops()[f"{__name__}:double"]  # type: ignore[attr-defined]
