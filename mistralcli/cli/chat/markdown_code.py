"""Code in an answer, highlighted by Pygments a line at a time, in the terminal's sixteen colours."""

from itertools import takewhile
from typing import Any

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

from mistralcli.cli.chat.markdown_pen import PLAIN, Piece, Style

_Kind = Any  # of token; Pygments has no types
_Token = tuple[int, _Kind, str]
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

    A line is read together with those before it, since it may be in a string or a comment. So that a long block costs
    no more for each line than a short one, these are forgotten now and then: behind a blank line outside of strings
    and comments, and behind a line that reads the same without them. Of a long string or comment only the line where
    it begins is remembered.
    """

    def __init__(self, lexer: Lexer) -> None:
        self._lexer = lexer
        self._earlier = ""

    def read_line(self, line: str) -> list[Piece]:
        """The pieces of `line`, which together are `line`."""
        tokens = self._tokens(f"{self._earlier}{line}\n")
        pieces = _pieces(tokens, len(self._earlier))
        self._earlier = self._needed(f"{self._earlier}{line}\n", line, tokens, pieces)
        if "".join(value for value, _ in pieces) != f"{line}\n":
            return [(line, PLAIN)]
        return [(value.removesuffix("\n"), style) for value, style in pieces]

    def _tokens(self, text: str) -> list[_Token]:
        """The tokens of `text`: where each begins, its kind, and itself."""
        lexed = self._lexer.get_tokens_unprocessed(text + _CLOSING)
        return [(at, kind, value[: len(text) - at]) for at, kind, value in lexed if at < len(text)]

    def _needed(self, text: str, line: str, tokens: list[_Token], pieces: list[Piece]) -> str:
        """What of `text`, which ends with `line`, is read with the next line."""
        if len(text) <= _FEW_CHARS or not tokens:
            return text
        if _is_literal(tokens[-1]):
            opening = _opening(text, tokens)
            found = self._tokens(opening)
            if found and found[-1][1] is tokens[-1][1]:
                return opening
        elif not line.strip() or _pieces(self._tokens(f"{line}\n"), 0) == pieces:
            return ""
        return "" if len(text) > _MANY_CHARS else text


def _pieces(tokens: list[_Token], start: int) -> list[Piece]:
    """What the tokens show from there on."""
    cut = ((value[max(0, start - at) :], kind) for at, kind, value in tokens)
    return [(value, _style_of(kind)) for value, kind in cut if value]


def _opening(text: str, tokens: list[_Token]) -> str:
    """The line where the string or the comment begins that `text` ends in."""
    end = len(text) - sum(len(value) for _, _, value in takewhile(_is_literal, reversed(tokens)))
    return text[text.rfind("\n", 0, end) + 1 : text.find("\n", end) + 1]


def _is_literal(token: _Token) -> bool:
    return token[1] in Token.Literal or token[1] in Token.Comment


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
