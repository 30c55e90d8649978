"""Tables in an answer: the source's rows, aligned by what their cells take on a terminal."""

import re
from collections.abc import Callable

from rich.cells import cell_len

from mistralcli.cli.chat.markdown_pen import BOLD, DIM, PLAIN, Piece, Style

_DELIMITER = re.compile(r"\s*\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*")
_BAR = re.compile(r"(?<!\\)\|")
Cell = list[Piece]
ReadCell = Callable[[str, Style], Cell]


def cells_of(row: str) -> list[str]:
    r"""The texts between the bars of a row; `\|` is a bar in a cell."""
    cells = [cell.strip().replace("\\|", "|") for cell in _BAR.split(row.strip().removeprefix("|"))]
    return cells[:-1] if len(cells) > 1 and not cells[-1] else cells


def is_table(header: str, delimiter: str) -> bool:
    """Whether these two rows begin a table: the second only says how as many columns are aligned."""
    return _DELIMITER.fullmatch(delimiter) is not None and len(cells_of(header)) == len(cells_of(delimiter))


def lay_out(rows: list[str], read_cell: ReadCell, width: int) -> list[Cell]:
    """The lines of a table: aligned, or where that is wider than `width`, a line for each cell behind its heading.

    `rows` are a header, a delimiter and any number of others, which may have fewer cells, or more.
    """
    texts = [cells_of(row) for i, row in enumerate(rows) if i != 1]
    n_columns = max(map(len, texts))
    table = [
        [read_cell(text, PLAIN if i else BOLD) for text in row + [""] * (n_columns - len(row))]
        for i, row in enumerate(texts)
    ]
    widths = [max(3, *(_width(row[column]) for row in table)) for column in range(n_columns)]
    if len(table) > 1 and sum(widths) + 3 * (n_columns - 1) > width:
        return _listed(table)
    marks = [*cells_of(rows[1]), *["-"] * n_columns][:n_columns]
    lines = [_joined([_aligned(*cell) for cell in zip(row, widths, marks, strict=True)]) for row in table]
    dashes: list[Cell] = [[(_dashes(*column), DIM)] for column in zip(widths, marks, strict=True)]
    return [lines[0], _joined(dashes), *lines[1:]]


def _width(cell: Cell) -> int:
    return cell_len("".join(text for text, _ in cell))


def _dashes(width: int, mark: str) -> str:
    left, right = (":" if end == ":" else "-" for end in (mark[0], mark[-1]))
    return left + "-" * (width - 2) + right


def _aligned(cell: Cell, width: int, mark: str) -> Cell:
    blank = width - _width(cell)
    left = (blank // 2 if mark[0] == ":" else blank) if mark[-1] == ":" else 0
    return [(" " * left, PLAIN), *cell, (" " * (blank - left), PLAIN)]


def _joined(cells: list[Cell]) -> Cell:
    """A line of cells with bars between them and nothing behind the last one."""
    line = [piece for cell in cells for piece in [(" | ", DIM), *cell]][1:]
    while line and not line[-1][0].strip():
        line.pop()
    return [*line[:-1], *((text.rstrip(), style) for text, style in line[-1:])]


def _listed(table: list[list[Cell]]) -> list[Cell]:
    """The rows one below the other, a blank line between two."""
    header, *rows = table
    lines: list[Cell] = []
    for row in rows:
        filled = [(name, cell) for name, cell in zip(header, row, strict=True) if cell or name]
        lines += [[], *([*name, (": ", BOLD), *cell] for name, cell in filled)]
    return lines[1:]
