r"""Spans in a line of Markdown: bold, italic, struck out, code, links.

Stricter than CommonMark, since a marker that is taken for a span's is not shown: `2*3*4`, `snake_case`, `__init__`,
`x**2`, `$a_b$` and `\[x\]` stay what they are. A span ends in its own line, within `HELD` characters.
"""

import re
from dataclasses import dataclass

from mistralcli.cli.chat.markdown_pen import Piece, Style

HELD = 120
"""How many characters are held back at most to see what they are: at 4 a token, 30 tokens."""

_ESCAPED = "*_`~#"
_BEFORE_SPAN = "([\"'<>*_~|-"  # beside white space and what is not ASCII
_MARKER = re.compile(r"\*+|_+|~+|`+|\[|\\")
_BODY = r"((?:`[^`]*`|\\.|[^`\\])+?)"  # code is closed in it, so more text makes no other match
_TEXT = r"(?:`[^`]*`|\\.|[^`\\\[\]])"
_URL = r"(?:[^()\s]|\([^()\s]*\))*+"


@dataclass(frozen=True)
class _Span:
    """What a marker opens: its pattern, whose last groups are what is shown, and the style of what is in it.

    While `beginning` matches all that has come, more text may complete the span; without it always.
    """

    pattern: re.Pattern[str]
    style: Style
    beginning: re.Pattern[str] | None = None


_LINK = _Span(
    re.compile(rf"\[({_TEXT}++)\]\(({_URL}(?:\s+\"[^\"]*\")?)\)"),
    (4,),
    re.compile(rf"\[{_TEXT}*+(?:`[^`]*|\\|\](?:\({_URL}(?:\([^()\s]*|\s+(?:\"[^\"]*\"?)?)?)?)?"),
)
_CODE = _Span(re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)"), (36,))
_SPANS = {
    "*": _Span(re.compile(rf"\*{_BODY}(?<![\s*])\*(?![*0-9])"), (3,)),
    "**": _Span(re.compile(rf"\*\*{_BODY}(?<!\s)\*\*(?!\*)"), (1,)),
    "***": _Span(re.compile(rf"\*\*\*{_BODY}(?<![\s*])\*\*\*(?!\*)"), (1, 3)),
    "_": _Span(re.compile(rf"_{_BODY}(?<![\s_])_(?!\w)"), (3,)),
    "~~": _Span(re.compile(rf"~~{_BODY}(?<!\s)~~(?!~)"), (9,)),
    "[": _LINK,
}


def read_spans(text: str, before: str, style: Style, *, ended: bool) -> tuple[list[Piece], int]:
    """The pieces of `text`, which follows the character `before` ("" at a line's start), and how much they take.

    What is left over, at most `HELD` characters, waits for more text; nothing is when the line has `ended`. What is
    decided stays so whatever follows.
    """
    pieces: list[Piece] = []
    at = 0
    while at < len(text):
        found = _MARKER.search(text, at)
        start = found.start() if found else len(text)
        if start > at:
            pieces.append((text[at:start], style))
            before = text[start - 1]
        at = start
        if found:
            span = _read_span(text[at : at + HELD], before, style, ended=ended)
            if span is None:
                break
            pieces += span[0]
            at += span[1]
            before = text[at - 1]
    return pieces, at


def _read_span(window: str, before: str, style: Style, *, ended: bool) -> tuple[list[Piece], int] | None:
    """What begins with the marker at the start of `window`, as `read_spans`; None while that is open."""
    found = _MARKER.match(window)
    assert found is not None
    marker = found[0]
    whole = ended or len(window) == HELD  # more is not looked at
    if len(marker) == len(window) and not whole:
        return None
    as_written = [(marker, style)], len(marker)
    following = window[len(marker) : len(marker) + 1]
    if marker == "\\":
        return ([(following, style)], 2) if following and following in _ESCAPED else as_written
    span = _CODE if marker[0] == "`" else _SPANS.get(marker)
    if span is None or not _opens(marker[0], before, following):
        return as_written
    match = span.pattern.match(window)
    if match and (whole or match.end() < len(window)):  # else the next character may belong to the marker
        return _shown(span, match, style), match.end()
    possible = match or span.beginning is None or span.beginning.fullmatch(window)
    return as_written if whole or not possible else None


def _opens(marker: str, before: str, following: str) -> bool:
    """Whether a span can begin with `marker` between these two characters."""
    if marker in "`[":
        return bool(following)
    if not following or following.isspace():
        return False
    if before.isascii():
        return not before or before.isspace() or before in _BEFORE_SPAN
    return marker != "_" or not before.isalnum()


def _shown(span: _Span, match: re.Match[str], style: Style) -> list[Piece]:
    """What is in a span, in its style; of a link its address too, as text, since no link can be trusted."""
    if span is _CODE:
        return [(match[2], style + span.style)]
    pieces, _ = read_spans(match[1], "", style + span.style, ended=True)
    return [*pieces, (f" ({match[2]})", style)] if span is _LINK else pieces
