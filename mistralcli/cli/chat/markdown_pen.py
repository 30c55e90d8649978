"""Styled text, one piece after the other: SGR codes only where the style changes, and nothing is written twice."""

Style = tuple[int, ...]
"""The SGR codes that are on. Of colours only the terminal's own sixteen, so that its theme decides about contrast."""
Piece = tuple[str, Style]

PLAIN: Style = ()
BOLD: Style = (1,)
DIM: Style = (2,)


class Pen:
    """Collects text until `take`; where pieces are cut makes no difference to it. Ends no line in a style."""

    def __init__(self, color: bool) -> None:
        self.color = color
        self.at_line_start = True
        self._style = PLAIN
        self._taken: list[str] = []

    def put(self, text: str, style: Style = PLAIN) -> None:
        """Write `text`, which is without control characters but for tabs and newlines."""
        if not text:
            return
        if self.color and style != self._style:
            self._taken.append(_switch(self._style, style))
            self._style = style
        self._taken.append(text)
        self.at_line_start = text.endswith("\n")

    def put_all(self, pieces: list[Piece]) -> None:
        for text, style in pieces:
            self.put(text, style)

    def put_status(self, text: str) -> None:
        """Show `text`, dim, on the empty line that the cursor is on, in the place of the status there before.

        It must fit into any terminal's row. An empty one leaves the line empty. Without colour there is none.
        """
        if self.color:
            shown = _switch(PLAIN, DIM) + text + _switch(DIM, PLAIN) if text else ""
            self._taken.append("\r\x1b[K" + shown)

    def take(self) -> str:
        """What was written since the last time."""
        text = "".join(self._taken)
        self._taken.clear()
        return text


def _switch(before: Style, after: Style) -> str:
    codes = ((0,) if before or not after else ()) + after
    return f"\x1b[{';'.join(map(str, codes))}m"
