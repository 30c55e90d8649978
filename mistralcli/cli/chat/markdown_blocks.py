"""What a line of Markdown begins with, decided from as little of it as possible."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["blank", "text", "heading", "quote", "item", "rule", "fence", "table"]


@dataclass(frozen=True)
class Opening:
    """What a line, or the rest of one behind a quote's or an item's mark, is.

    It begins with `indent` blanks; `end` is where what follows the mark begins.
    """

    kind: Kind
    indent: int
    end: int


@dataclass(frozen=True)
class Fence:
    """What opened a block of code: so many of a character, in so many quotes; `info` says the language."""

    mark: str
    info: str
    n_quotes: int

    def is_closed_by(self, line: str) -> bool:
        return re.fullmatch(rf"[ \t]*{self.mark}+[ \t]*", line) is not None and len(line.strip()) >= len(
            self.mark
        )

    def quote_of(self, line: str) -> str | None:
        """The marks of the quotes that the block is in, which `line` begins with; None when it does not."""
        match = re.match(rf"(?:[ \t]*> ?){{{self.n_quotes}}}", line)
        return match and match[0]

    def may_be_closed_by(self, beginning: str) -> bool:
        return not beginning.strip().strip(self.mark[0])


# The mark of a line of each kind, and what may become one with more text. A rule and a fence are whole lines.
_OPENINGS: dict[Kind, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "heading": (re.compile(r"#{1,6}(?:[ \t]+|\Z)"), re.compile(r"#{1,6}[ \t]*")),
    "quote": (re.compile(r"> ?"), re.compile(r">")),
    "rule": (
        re.compile(r"([-*_])(?:[ \t]*\1){2,}[ \t]*\Z"),
        re.compile(r"([-*_])(?:[ \t]*\1)*[ \t]*"),
    ),
    "item": (
        re.compile(r"(?:[-*+]|\d{1,9}[.)])(?:[ \t]+|\Z)"),
        re.compile(r"(?:[-*+]|\d{1,9}[.)]?)[ \t]*"),
    ),
    "fence": (re.compile(r"(?:`{3,}[^`]*|~{3,}.*)\Z"), re.compile(r"`{1,2}|`{3,}[^`]*|~{1,2}|~{3,}.*")),
    "table": (re.compile(r"\|"), re.compile(r"(?!)")),
}


def opening_of(line: str, *, ended: bool, whole: bool) -> Opening | None:
    """What `line` is, the same whatever follows it; None when that depends on it.

    It has `ended`, or is a beginning. `whole` says that no more is looked at, so that it must be decided.
    """
    body = line.lstrip(" \t")
    indent = len(line) - len(body)
    if not body:
        return Opening("blank" if ended else "text", indent, 0) if whole else None
    if not whole and any(beginning.fullmatch(body) for _, beginning in _OPENINGS.values()):
        return None
    for kind, (mark, _) in _OPENINGS.items():
        match = mark.match(body)
        if match and (ended or kind not in ("rule", "fence")):
            return Opening(kind, indent, indent + match.end())
    return Opening("text", indent, 0)


def fence_of(line: str, n_quotes: int) -> Fence:
    """The block of code that `line`, a fence, opens."""
    body = line.strip()
    info = body.lstrip(body[0])
    return Fence(body[: len(body) - len(info)], info, n_quotes)
