"""Markdown on a terminal while it comes.

What is written stays: there is no cursor movement, so nothing flickers, and a terminal that is resized has nothing
to get wrong. Lines are broken by the terminal alone, so that a copy of the screen is the text. Held back is only what
cannot be shown before more has come: a line's mark, a span until its end (`markdown_inline.HELD`), a line of code to
be highlighted, and a table, beside a count of its rows in one short line that goes away.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

from mistralcli.cli.chat.markdown_blocks import Fence, Opening, fence_of, opening_of
from mistralcli.cli.chat.markdown_inline import HELD, read_spans
from mistralcli.cli.chat.markdown_pen import BOLD, DIM, PLAIN, Pen, Piece, Style
from mistralcli.cli.chat.markdown_table import is_table, lay_out
from mistralcli.cli.console import printable

if TYPE_CHECKING:
    from mistralcli.cli.chat.markdown_code import Highlighter

_HEADINGS: dict[int, Style] = {1: (1, 4, 35), 2: (1, 35)}
_MARK: Style = (36,)
_RULE = "─" * 20
_HELD_CODE = 500  # characters; what is longer is not highlighted
_HELD_ROW = 2000  # what is longer is no row of a table
_MANY_MARKS = 10  # quotes and items in one line
_Mode = Callable[[bool], Optional["_Mode"]]


class MarkdownStream:
    """Shows one answer in Markdown as it comes; the output does not depend on how the text was cut.

    `write` gets text with SGR codes in it, ready for a terminal of `width()` columns. Without `color` marks are shown
    as they are, since nothing else would show the structure, and tables are aligned all the same. The model's
    control characters are escaped as everywhere (`console.printable`), and no address is made a link.
    """

    def __init__(self, write: Callable[[str], None], *, width: Callable[[], int], color: bool) -> None:
        self._write = write
        self._width = width
        self._pen = Pen(color)
        self._line = ""  # what has come of a line and is not shown
        self._ends_in_cr = False  # which may be half of a line's end
        self._fence: Fence | None = None  # of the code that we are in
        self._highlighter: Highlighter | None = None
        self._rows: list[str] = []  # of a table, or of what may become one
        self._in_list = False
        self._may_indent_code = True
        self._begin_line()

    def write(self, text: str) -> None:
        """Show the next piece of the answer, but for what has to wait."""
        text = "\r" * self._ends_in_cr + text
        self._ends_in_cr = text.endswith("\r")
        text = text.removesuffix("\r").replace("\r\n", "\n")
        *lines, rest = printable(text).split("\n")
        for line in lines:
            self._take(line, ended=True)
        if rest:
            self._take(rest, ended=False)
        self._show()

    def close(self) -> None:
        """Show what has waited; the cursor is at the start of a line then."""
        if self._ends_in_cr:
            self._take(printable("\r"), ended=False)
        if self._line:
            self._take("", ended=True)
        self._end_table()
        if not self._pen.at_line_start:
            self._pen.put("\n")
        self._show()

    def _show(self) -> None:
        if text := self._pen.take():
            self._write(text)

    def _begin_line(self) -> None:
        self._mode: _Mode = self._code if self._fence else self._begin  # what takes the rest of the line
        self._n_marks = self._n_quotes = 0
        self._before = ""  # the character that was shown last
        self._base = PLAIN
        self._is_held = False

    def _take(self, part: str, *, ended: bool) -> None:
        self._line += part
        mode: _Mode | None = self._mode
        while mode:
            self._mode = mode
            mode = mode(ended)
        if ended:
            if not self._is_held:
                self._pen.put("\n")
            self._begin_line()

    # The modes: each shows what it can of the line and returns the mode that goes on with the rest, if another.

    def _begin(self, ended: bool) -> _Mode | None:
        """At the start of a line, or behind the mark of a quote or an item."""
        head = self._line[:HELD]
        is_line = ended and len(self._line) < HELD
        opening = opening_of(head, ended=is_line, whole=is_line or len(head) == HELD)
        if opening is None:
            return None
        is_code = not self._n_marks and self._is_indented_code(opening)
        if opening.kind == "table" and not self._n_marks and not is_code:
            return self._row
        self._end_table()
        return self._plain if is_code else self._open(opening)

    def _is_indented_code(self, opening: Opening) -> bool:
        """Whether a line is code by its indent alone: behind a blank line or more of it, and in no list."""
        if opening.kind == "item" or (opening.kind != "blank" and not opening.indent):
            self._in_list = opening.kind == "item"
        is_deep = len(self._line[: opening.indent].expandtabs(4)) >= 4
        is_code = (
            is_deep and self._may_indent_code and not self._in_list and opening.kind not in ("blank", "fence")
        )
        self._may_indent_code = is_code or opening.kind == "blank"
        return is_code

    def _open(self, opening: Opening) -> _Mode | None:
        mark, rest = self._line[: opening.end], self._line[opening.end :]
        if opening.kind in ("quote", "item") and self._n_marks < _MANY_MARKS:
            self._pen.put(mark, _MARK)
            self._line = rest
            self._n_marks += 1
            self._n_quotes += opening.kind == "quote"
            return self._begin
        if opening.kind == "heading":
            self._base = _HEADINGS.get(len(mark.strip()), BOLD)
            self._line = rest if self._pen.color else self._line
        elif opening.kind == "rule":
            self._put_line(_RULE if self._pen.color else self._line, DIM)
        elif opening.kind == "fence":
            self._fence = fence_of(self._line, self._n_quotes)
            self._highlighter = self._find_highlighter(self._fence.info)
            self._put_line(self._line, DIM)
        return self._text

    def _text(self, ended: bool) -> None:
        if self._pen.color:
            pieces, end = read_spans(self._line, self._before, self._base, ended=ended)
            self._pen.put_all(pieces)
            self._before = self._line[end - 1] if end else self._before
            self._line = self._line[end:]
        else:
            self._put_line(self._line)

    def _plain(self, ended: bool) -> None:
        self._put_line(self._line)

    def _code(self, ended: bool) -> _Mode | None:
        """A line in a block of code, or the one that ends it."""
        assert self._fence is not None
        is_read_whole = self._highlighter or self._fence.n_quotes
        held = _HELD_CODE if is_read_whole else HELD
        may_wait = is_read_whole or self._fence.may_be_closed_by(self._line)
        if not ended and len(self._line) < held and may_wait:
            return None
        is_line = ended and len(self._line) < held
        quote = self._fence.quote_of(self._line[:held])
        if quote is None:
            self._fence = None
            return self._begin
        self._pen.put(quote, _MARK)
        self._line = self._line[len(quote) :]
        if is_line and self._fence.is_closed_by(self._line):
            self._fence = None
            self._put_line(self._line, DIM)
        elif is_line and self._highlighter:
            self._pen.put_all(self._highlighter.read_line(self._line))
            self._line = ""
        return self._plain

    def _row(self, ended: bool) -> _Mode | None:
        """A line that begins with a bar: of a table, if the second one says so."""
        if len(self._line) >= _HELD_ROW:
            self._end_table()
            return self._text
        if ended:
            if len(self._rows) == 1 and not is_table(self._rows[0], self._line):
                self._end_table()
            self._rows.append(self._line)
            self._line = ""
            self._is_held = True
            if len(self._rows) > 1:
                self._pen.put_status(f"(table: row {len(self._rows) - 2})")
        return None

    def _end_table(self) -> None:
        """Show the rows that were held, if there are any."""
        rows, self._rows = self._rows, []
        if len(rows) > 1:
            self._pen.put_status("")
            lines = lay_out(rows, self._cell, self._width())
        else:
            lines = [self._cell(row, PLAIN) for row in rows]
        for line in lines:
            self._pen.put_all([*line, ("\n", PLAIN)])

    def _cell(self, text: str, style: Style) -> list[Piece]:
        if not self._pen.color:
            return [(text, style)] if text else []
        return read_spans(text, "", style, ended=True)[0]

    def _find_highlighter(self, info: str) -> "Highlighter | None":
        if not self._pen.color or not info:
            return None
        from mistralcli.cli.chat.markdown_code import highlighter_for

        return highlighter_for(info)

    def _put_line(self, text: str, style: Style = PLAIN) -> None:
        """Show `text` for what has come of the line."""
        self._pen.put(text, style)
        self._line = ""
