"""Plain tables, for standard output."""

from collections.abc import Sequence

from mistralcli.cli import console


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text in columns two spaces apart, without spaces at the ends of lines."""
    cells = [[console.printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(line.rstrip() + "\n" for line in lines)
