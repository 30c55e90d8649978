"""Codes survive packing, and the packed words are those that compressed-tensors' format prescribes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.packing import pack_codes, pack_zeros, unpack_codes, unpack_zeros, words

LITERALS = [
    (4, [-8, -7, 0, 7, 1, 2, 3, 4, 5, -1], [0xCBA9F810, 0x0000007D]),
    (8, [-128, -1, 0, 127, 5], [0xFF807F00, 0x00000085]),
]
"""Bits, codes and words that compressed-tensors itself wrote."""


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """Any matrix of codes that fits 4 or 8 bits."""
    bits = draw(st.sampled_from([4, 8]))
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 41)))
    values = st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
    return bits, torch.from_numpy(draw(arrays(np.int8, shape, elements=values)))


def words_by_definition(row: list[int], bits: int) -> list[int]:
    """Element i of a row sits at bit i · bits of one long little-endian number, as q + 2^(bits − 1)."""
    number = sum((q + (1 << bits - 1)) << (i * bits) for i, q in enumerate(row))
    return [number >> 32 * k & 0xFFFFFFFF for k in range(words(len(row), bits))]


@pytest.mark.parametrize(("bits", "row", "expected"), LITERALS)
def test_packed_words_are_those_of_compressed_tensors(bits: int, row: list[int], expected: list[int]) -> None:
    column = torch.tensor([row], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack_codes(column, bits)[0].tolist()] == expected
    assert [word & 0xFFFFFFFF for word in pack_zeros(column.T, bits)[:, 0].tolist()] == expected


@given(codes())
def test_unpacking_gives_the_codes_back(case: tuple[int, torch.Tensor]) -> None:
    bits, matrix = case
    assert torch.equal(unpack_codes(pack_codes(matrix, bits), bits, matrix.shape[1]), matrix)
    assert torch.equal(unpack_zeros(pack_zeros(matrix, bits), bits, matrix.shape[0]), matrix)


@given(codes())
def test_words_are_the_definition_and_tails_are_zero_bits(case: tuple[int, torch.Tensor]) -> None:
    bits, matrix = case
    for row, packed in zip(matrix.tolist(), pack_codes(matrix, bits).tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in packed] == words_by_definition(row, bits)
    for column, packed in zip(matrix.T.tolist(), pack_zeros(matrix, bits).T.tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in packed] == words_by_definition(column, bits)
