"""Sizes are read as people write them, and what is none is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistralcli.errors import UsageError
from mistralcli.units import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("6GB", 6_000_000_000),
        ("6GiB", 6 << 30),
        ("6 gib", 6 << 30),
        ("6G", 6_000_000_000),
        ("800MB", 800_000_000),
        ("1.5kB", 1_500),
        (".5TB", 500_000_000_000),
        ("123", 123),
        (" 123 B ", 123),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "6XB", "-6GB", "6iB", "6GBs", "1e9", "6,5GB", "inf", "nan", "٦GB x", "0", "0.1"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="is no"):
        parse_size(text)


@given(st.integers(1, 10**14))
def test_what_is_shown_reads_back_within_its_three_digits(size_bytes: int) -> None:
    assert parse_size(size_text(size_bytes)) == pytest.approx(size_bytes, rel=0.006)
