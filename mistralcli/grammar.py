"""Completions that fit a grammar: at every step only tokens that it allows can be chosen.

llguidance keeps track of where in the grammar a completion is and says which tokens may follow; here that becomes a
chooser of tokens in front of the sampler.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mistralcli.engine import ChooseToken
from mistralcli.errors import MistralError, UsageError
from mistralcli.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Kind = Literal["schema", "regex", "grammar"]

_FORMS: dict[Kind, str] = {
    "schema": "it must be a JSON schema, in JSON",
    "regex": "it must be a regular expression as Rust has them: without look-around and back-references",
    "grammar": 'it must be a grammar in Lark\'s form, like: start: "yes" | "no"',
}

_MARK = "\x01"
"""A character that tokenizers join with none."""

_ONE_LINE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""JSON as most of it is written on one line. Where white space is free, small models go on with it for ever."""


def compile_constraint(
    kind: Kind, source: str, tokenizer: Tokenizer, stop_ids: frozenset[int]
) -> "Constraint":
    """What `source` allows: a JSON schema, a regular expression (Rust's syntax), or a grammar in Lark's notation.

    Raises:
        UsageError: it is none, or uses what is not supported; llguidance says what.
    """
    vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, stop_ids)), eos_token=sorted(stop_ids))
    try:
        grammar = _grammar(kind, source)
    except ValueError as error:
        raise UsageError(f"the {kind} cannot be read: {error}", _FORMS[kind]) from error
    wrong = LLMatcher.validate_grammar(grammar, vocabulary)
    if wrong and not wrong.startswith("WARNING"):
        raise UsageError(f"the {kind} cannot be used: {_first_line(wrong)}", _FORMS[kind])
    return Constraint(LLMatcher(vocabulary, grammar, log_level=0), stop_ids)


def _grammar(kind: Kind, source: str) -> str:
    if kind == "schema":
        return LLMatcher.grammar_from_json_schema(source, overrides=_ONE_LINE)
    return LLMatcher.grammar_from_regex(source) if kind == "regex" else LLMatcher.grammar_from_lark(source)


def _first_line(error: str) -> str:
    """Without the state that llguidance prints behind an error."""
    return " ".join(error.partition("<state>")[0].split())


class _Vocabulary:
    """A tokenizer as llguidance wants it: the bytes of every token, and the tokens of a text in the midst of another.

    Control tokens get names that no text can have: what they add to one is nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        pieces = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer
        self.special_token_ids = [token_id for token_id, piece in enumerate(pieces) if piece is None]
        self.tokens = [
            f"<control {token_id}>".encode() if piece is None else piece
            for token_id, piece in enumerate(pieces)
        ]
        self.eos_token_id = min(stop_ids)
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: str) -> list[int]:
        """The ids of `text` behind other text: alone, SentencePiece would begin it with a space."""
        token_ids = self._tokenizer.encode(_MARK + text)
        bytes_before = 0
        for n_before, token_id in enumerate(token_ids):
            if bytes_before and b"".join(self.tokens[i] for i in token_ids[n_before:]) == text.encode():
                return token_ids[n_before:]
            bytes_before += len(self.tokens[token_id])
        return self._greedy(text.encode()) if text else []

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token first, again and again, for a text that the tokenizer would change.

        What no token has ends it.
        """
        ids_by_token = {token: token_id for token_id, token in enumerate(self.tokens)}
        token_ids: list[int] = []
        while data:
            known = (n for n in range(len(data), 0, -1) if data[:n] in ids_by_token)
            n_bytes = next(known, 0)
            if not n_bytes:
                break
            token_ids.append(ids_by_token[data[:n_bytes]])
            data = data[n_bytes:]
        return token_ids


class Constraint:
    """Where in its grammar a completion is. It begins at the beginning, and ends with a stop id."""

    def __init__(self, matcher: LLMatcher, stop_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids

    def copy(self) -> "Constraint":
        """Another completion that is where this one is."""
        return Constraint(self._matcher.deep_copy(), self._stop_ids)

    @property
    def is_complete(self) -> bool:
        """Whether what has come is a whole sentence of the grammar."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (vocab_size,), those of tokens that cannot follow replaced by −inf."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_sound()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)]).bool()
        allowed[: len(known)] = known
        return logits.masked_fill(~allowed.to(logits.device), -math.inf)

    def advance(self, token_id: int) -> None:
        """Go on by a token that `masked` allowed; a stop id is the end."""
        if token_id not in self._stop_ids:
            self._matcher.consume_token(token_id)
            self._require_sound()

    def around(self, choose: ChooseToken) -> ChooseToken:
        """A chooser of tokens that keeps to the grammar, in front of another."""

        def constrained(logits: torch.Tensor, token_ids: Sequence[int]) -> int:
            token_id = choose(self.masked(logits), token_ids)
            self.advance(token_id)
            return token_id

        return constrained

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise MistralError(
                f"the grammar is too much for llguidance: {_first_line(self._matcher.get_error())}",
                "make it simpler",
            )
