"""Code in an answer, highlighted by Pygments a line at a time, in the terminal's sixteen colours."""

from collections.abc import Iterator
from typing import Any

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

from mistralcli.cli.chat.markdown_pen import PLAIN, Piece, Style

_Kind = Any  # of token; Pygments has no types
_STYLES: dict[_Kind, Style] = {
    Token: PLAIN,
    Token.Comment: (2,),
    Token.Comment.Preproc: (35,),
    Token.Keyword: (35,),
    Token.Operator.Word: (35,),
    Token.Literal.String: (32,),
    Token.Literal.Number: (36,),
    Token.Keyword.Constant: (36,),
    Token.Name.Builtin: (36,),
    Token.Name.Function: (1,),
    Token.Name.Class: (1,),
    Token.Name.Tag: (35,),
    Token.Name.Attribute: (36,),
    Token.Name.Decorator: (35,),
    Token.Generic.Deleted: (31,),
    Token.Generic.Inserted: (32,),
    Token.Generic.Heading: (1,),
    Token.Generic.Subheading: (35,),
}
_CLOSING = "\n*/"  # many lexers know a comment only with its end; it harms none of the rest
_FEW_CHARS, _MANY_CHARS = 400, 2000


class Highlighter:
    """Highlights the lines of one block in order.

    A line is read together with those before it, as far back as a blank line outside of strings and comments, so
    that a long block costs no more for each line than a short one.
    """

    def __init__(self, lexer: Lexer) -> None:
        self._lexer = lexer
        self._earlier = ""

    def read_line(self, line: str) -> list[Piece]:
        """The pieces of `line`, which together are `line`."""
        text = f"{self._earlier}{line}\n"
        tokens = list(self._tokens_from(text, len(self._earlier)))
        in_literal = bool(tokens) and (tokens[-1][1] in Token.Literal or tokens[-1][1] in Token.Comment)
        over = len(text) > _FEW_CHARS and not line.strip() and not in_literal
        self._earlier = "" if over or len(text) > _MANY_CHARS else text
        pieces = [(value, _style_of(kind)) for value, kind in tokens]
        if "".join(value for value, _ in pieces) != f"{line}\n":
            return [(line, PLAIN)]
        return [(value.removesuffix("\n"), style) for value, style in pieces]

    def _tokens_from(self, text: str, start: int) -> Iterator[tuple[str, _Kind]]:
        """The tokens of text[start:], cut out of those of `text`."""
        for at, kind, value in self._lexer.get_tokens_unprocessed(text + _CLOSING):
            if part := text[max(at, start) : at + len(value)]:
                yield part, kind


def highlighter_for(info: str) -> Highlighter | None:
    """What highlights a block that begins with a fence and `info`; None where the language is unknown."""
    words = info.strip().strip("{}.").split()
    try:
        return Highlighter(get_lexer_by_name(words[0].lower(), startinline=True)) if words else None
    except ClassNotFound:
        return None


def _style_of(kind: _Kind) -> Style:
    while kind not in _STYLES:
        kind = kind.parent
    return _STYLES[kind]
