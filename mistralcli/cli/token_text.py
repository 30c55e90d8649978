"""Token ids as somebody reads them: what each adds to a text, with all that is invisible written out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistralcli.cli import console
from mistralcli.demo import DEMO

if TYPE_CHECKING:
    from mistralcli.tokenizer import Tokenizer

_ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\", '"': r"\""}


@dataclass(frozen=True)
class Token:
    """An id, with the name of the control token that it is, or the bytes that it adds to a text."""

    token_id: int
    control: str | None
    data: bytes

    @property
    def shown(self) -> str:
        r"""On one line: a control token by its name, a text in quotes: `[INST]` is not `"[INST]"`."""
        return self.control or quoted(self.data)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; bytes in hexadecimal, since not every token is whole characters."""
        text = self.control or self.data.decode("utf-8", "replace")
        return {
            "id": self.token_id,
            "text": text,
            "bytes": None if self.control else self.data.hex(),
            "control": self.control is not None,
        }


def load_named_tokenizer(model: str | None) -> "Tokenizer":
    """The tokenizer of a model, or of the demo, without its weights.

    Raises:
        ModelNotFoundError: there is no model of that name.
    """
    from mistralcli import store
    from mistralcli.config import read_config
    from mistralcli.tokenizer import load_fitting_tokenizer

    if model is None:
        console.note("no model was named, so this is the built-in demo's tokenizer; name one with -m")
    directory = store.resolve_demo() if model is None else store.resolve(model)
    return load_fitting_tokenizer(directory, read_config(directory).vocab_size)


def model_name(model: str | None) -> str:
    """What the model is called in what is printed."""
    return DEMO if model is None else model


def tokens_of(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> list[Token]:
    """The ids with what they are. One that is neither text nor control (SentencePiece's unknown) goes by its piece."""
    found = []
    for token_id in token_ids:
        control, data = tokenizer.control_name(token_id), tokenizer.token_bytes(token_id)
        if control is None and data is None:
            control = tokenizer.render([token_id])
        found.append(Token(token_id, control, data or b""))
    return found


def quoted(data: bytes) -> str:
    r"""Bytes as a text in quotes in which each character shows.

    >>> print(quoted(b' a\n\xf0\x9f"'), quoted("\u202e\u00a0é".encode()))
    " a\n\xf0\x9f\"" "\u202e\xa0é"
    """
    text = data.decode("utf-8", "surrogateescape")
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as surrogateescape keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
