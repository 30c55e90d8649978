"""Small inputs, the same every time, on which the doctor holds each operator's kernel to its reference."""

from collections.abc import Mapping
from typing import Any

import torch

from mistralcli.cache import Ring, Seen
from mistralcli.ops import rotary_tables
from quant.kernels.cpu.layout import interleave

Arguments = tuple[Any, ...]

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""What rounding explains, relative to an output's largest value: float32's in sums, five of bfloat16's (2⁻⁸), four of
float16's (2⁻¹¹)."""

LOGIT_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""The lead of one logit over another, in the demo model, up to which rounding may reverse their order.

Measured on the 30 layers of SmolLM2-135M in int4, over 128 tokens and the ten likeliest of each: the difference of two
logits is off by up to 6e-5, 0.7 and 0.1. Errors grow with the square root of the depth, and the demo has six layers.
"""

ROUNDED_LOGIT_BOUND = 1.5
"""The same where the CPU's kernels round activations to 8 bits: up to 1.12 in the demo, over 300 tokens of its own (and
1.4 in SmolLM2-135M). A wrong kernel still shows in the 70 of the golden completion's 96 tokens that lead by more."""


def cases(dtype: torch.dtype) -> Mapping[str, list[Arguments]]:
    """Arguments on the CPU for every operator by its name: as when decoding one token, and for several at once."""
    token_counts = (1, 37)
    return {
        "mistralcli.ops:rms_norm": [
            (_randn(n, 512, dtype=dtype), _randn(512, dtype=dtype), 1e-5) for n in token_counts
        ],
        "mistralcli.ops:apply_rotary": [_rotary_case(n, dtype) for n in token_counts],
        "mistralcli.ops:tied_logits": [
            (_randn(n, 512, dtype=dtype), _randn(640, 512, dtype=dtype, seed=1)) for n in token_counts
        ],
        "mistralcli.cache:write_ring": [_write_case(n, dtype) for n in token_counts],
        "mistralcli.ops:attention": [_attention_case(n, dtype) for n in token_counts],
        "mistralcli.ops:swiglu": [
            (_randn(n, 640, dtype=dtype), _randn(n, 640, dtype=dtype, seed=1)) for n in token_counts
        ],
        "quant.ops:int4_matmul": [
            _matmul_case(4, n, zeros, dtype) for n in token_counts for zeros in (False, True)
        ],
        "quant.ops:int8_matmul": [
            _matmul_case(8, n, zeros, dtype) for n in token_counts for zeros in (False, True)
        ],
        "quant.ops:interleaved_matmul": [
            _interleaved_case(bits, n, zeros, dtype)
            for bits in (4, 8)
            for n in token_counts
            for zeros in (False, True)
        ],
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed)).to(dtype)


def _rotary_case(n_tokens: int, dtype: torch.dtype) -> Arguments:
    positions = torch.arange(1000, 1000 + n_tokens)[None]
    return (_randn(1, n_tokens, 8, 128, dtype=dtype), *rotary_tables(positions, head_dim=128, theta=1e6))


def _write_case(n_tokens: int, dtype: torch.dtype) -> Arguments:
    """Two key heads of 50 slots, at whose end the ring wraps."""
    buffer, x = torch.zeros(1, 2, 50, 128, dtype=dtype), _randn(1, n_tokens, 2, 128, dtype=dtype)
    return (buffer, x, Seen(torch.arange(90, 90 + n_tokens)[None], Ring(50, 14), 50))


def _attention_case(n_tokens: int, dtype: torch.dtype) -> Arguments:
    """Eight query heads on two of keys, 300 slots, each query a window of 256 that ends at itself."""
    n_slots = 300
    seen = Seen(torch.arange(n_slots - n_tokens, n_slots)[None], Ring(n_slots, 256), n_slots)
    q = _randn(1, 8, n_tokens, 128, dtype=dtype)
    k, v = (_randn(1, 2, n_slots, 128, dtype=dtype, seed=seed) for seed in (1, 2))
    return (q, k, v, seen)


def _matmul_case(bits: int, n_tokens: int, has_zeros: bool, dtype: torch.dtype) -> Arguments:
    """512 in_features in groups of 128 to 384 out_features."""
    out_features, in_features, n_groups = 384, 512, 4
    n_bytes = in_features * bits // 8
    qweight = torch.randint(256, (out_features, n_bytes), generator=_generator(1), dtype=torch.uint8)
    scales = torch.rand((out_features, n_groups), generator=_generator(2)).add(0.5).div(2**bits).to(dtype)
    zeros = torch.randint(-8, 8, scales.shape, generator=_generator(3), dtype=torch.int8)
    return (_randn(1, n_tokens, in_features, dtype=dtype), qweight, scales, zeros if has_zeros else None)


def _interleaved_case(bits: int, n_tokens: int, has_zeros: bool, dtype: torch.dtype) -> Arguments:
    """The same in the layout of the CPU's kernels, for activations that rounding leaves as they are in float32."""
    x, qweight, scales, zeros = _matmul_case(bits, n_tokens, has_zeros, dtype)
    largest, size = (127, 1) if bits == 4 else (32767, 256)  # that many steps, of which a group has the last
    whole = torch.randint(-largest, largest + 1, x.shape, generator=_generator(0))
    whole[..., ::32] = largest
    return ((whole / size).to(dtype), interleave(qweight, scales, zeros, x.shape[-1], bits))
