"""Token ids to text, one id at a time."""

import codecs
import re
from collections.abc import Callable, Iterable

SPACE_MARK = "▁"
"""How SentencePiece writes a space inside a piece (U+2581)."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class StreamDecoder:
    """Text of a completion as its ids arrive: the pushes and the flush, joined, are `decode` of all of them.

    `token_bytes` gives the UTF-8 bytes that an id adds to the text, or None for a control token or an id that
    the tokenizer does not have: it adds no text, and ends a character that was begun. `drop_space` drops one
    space before the first text, which SentencePiece puts there and no writer did.

    Only the last, incomplete character (at most three bytes) is held back, so a push costs the same however
    long the completion is. Bytes that are no UTF-8 become U+FFFD, one for each longest broken sequence.
    """

    def __init__(self, token_bytes: Callable[[int], bytes | None], *, drop_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this id: often empty, never a part of a character."""
        data = self._token_bytes(token_id)
        if data is None:
            return self.flush()
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: nothing, or U+FFFD for a character that the completion did not finish."""
        return self._utf8.decode(b"", final=True)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Push all of `token_ids` and flush."""
        return "".join([*map(self.push, token_ids), self.flush()])


def piece_bytes(piece: str, *, byte_fallback: bool = True) -> bytes:
    """The bytes of a SentencePiece piece: `▁` is a space and, with `byte_fallback`, `<0x0A>` one byte."""
    if byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
        return bytes.fromhex(match[1])
    return piece.replace(SPACE_MARK, " ").encode()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece in GPT-2's alphabet, where one visible character stands for each byte.

    A piece with any other character (a token that was added as it is written) is its own UTF-8.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:
        return piece.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Visible Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
