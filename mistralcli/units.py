"""Quantities as people read and write them."""

import re

from mistralcli.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def size_text(size_bytes: int) -> str:
    """A size with three digits and a decimal unit, as disks are sold: 512 B, 4.13 GB, 14.5 GB.

    >>> [size_text(size) for size in (0, 999, 1_000, 2_450_000, 14_483_464_192)]
    ['0 B', '999 B', '1.00 kB', '2.45 MB', '14.5 GB']
    """
    value, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    if size_bytes < 1000:
        return f"{size_bytes} B"
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:#.3g}".rstrip(".") + f" {units[0]}"


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: GB are 10⁹ bytes, GiB are 2³⁰; case and the B do not matter.

    >>> [parse_size(text) for text in ("6GB", "6 GiB", "800MB", "1.5g", "512")]
    [6000000000, 6442450944, 800000000, 1500000000, 512]

    Raises:
        UsageError: it is no size, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size", "write it like 6GB, 6GiB or 800MB")
    number, prefix, binary = match.groups()
    size_bytes = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if size_bytes < 1:
        raise UsageError(f"{text!r} is no memory at all", "write it like 6GB, 6GiB or 800MB")
    return size_bytes
