"""Quantities as people read them."""


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
