"""Codes to bytes and back, as compressed-tensors' `pack-quantized` format stores them (docs/format.md).

A signed code q of `bits` bits is stored as q + 2^(bits−1). Codes fill little-endian int32 words from the
lowest bits up: a row of 8-bit codes is simply its bytes in order, a row of 4-bit codes is bytes with the low
nibble first. The last word of a row is filled with zero bits.
"""

import torch
from torch.nn.functional import pad

WORD_BITS = 32


def words(n_codes: int, bits: int) -> int:
    """How many int32 words hold `n_codes` codes."""
    return -(-n_codes * bits // WORD_BITS)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed int8 codes (rows, n) to int32 words (rows, words(n, bits)); bits is 4 or 8."""
    stored = codes.view(torch.uint8) + (1 << bits - 1)  # wraps around, as it should
    stored = pad(stored, (0, -codes.shape[1] % (WORD_BITS // bits)))
    if bits == 4:
        stored = stored[:, 0::2] | stored[:, 1::2] << 4
    return stored.flatten().view(torch.int32).view(len(codes), -1)


def unpack_codes(packed: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    """The inverse of `pack_codes`: int32 words (rows, words(n_codes, bits)) to int8 codes (rows, n_codes)."""
    stored = packed.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    return (stored[:, :n_codes] - (1 << bits - 1)).view(torch.int8)


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed int8 zero points (out_features, n_groups) to int32 (words(out_features, bits), n_groups).

    Zero points are packed along out_features where weights are packed along in_features.
    """
    return pack_codes(zeros.T.contiguous(), bits).T.contiguous()


def unpack_zeros(packed: torch.Tensor, bits: int, out_features: int) -> torch.Tensor:
    """The inverse of `pack_zeros`: int8 (out_features, n_groups)."""
    return unpack_codes(packed.T, bits, out_features).T.contiguous()
