"""tokenizer.json with the Jinja chat template beside it: the tokenizer of fine-tunes that bring their own."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Encoder

from mistralcli.chat_template import ChatTemplate
from mistralcli.config import read_json
from mistralcli.conversation import NO_EXTRAS, ChatExtras, Conversation, well_formed
from mistralcli.detokenizer import SPACE_MARK, StreamDecoder, byte_level_bytes, piece_bytes
from mistralcli.errors import IntegrityError, MistralError, UsageError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class HuggingFaceTokenizer:
    """A `tokenizers` tokenizer and a chat template (see `tokenizer.Tokenizer`).

    `bos_id` is None where texts begin with no such token, whatever `bos_token` is used for.
    """

    family = "hf"

    def __init__(self, directory: Path, template: ChatTemplate | None) -> None:
        """Read tokenizer.json; `eos_ids` has the id of `eos_token`.

        Raises IntegrityError for a broken file, or a decoder that is neither byte-level nor SentencePiece's.
        """
        path = directory / "tokenizer.json"
        encoder = _read(path)
        config = _read_if_there(directory / "tokenizer_config.json")
        self._names = _named_tokens(_read_if_there(directory / "special_tokens_map.json") | config)
        self._template = template
        self.version = "none" if template is None else "jinja"
        self.vocab_size: int = encoder.get_vocab_size()
        self.bos_id = _begin_id(encoder, config, self._names)
        self._eos_id = _token_id(encoder, self._names, "eos_token")
        self.eos_ids = frozenset(() if self._eos_id is None else (self._eos_id,))

        self._bytes_of_piece, self._drops_space = _decoding(encoder, path)
        added = encoder.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        template_names = " ".join([*self._names.values(), template.source if template else ""])
        self._encoder = _GuardedEncoder(encoder, template_names)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self._eos_id] if eos and self._eos_id is not None else []
        return before + self._encoder.encode(well_formed(text)) + after

    def encode_chat(self, conversation: Conversation, extras: ChatExtras = NO_EXTRAS) -> list[int]:
        if self._template is None:
            raise UsageError("this model has no chat template", "give it text to continue, with `--raw`")
        hidden = [
            replace(message, content=self._encoder.hide(well_formed(message.content)))
            for message in conversation.messages
        ]
        tools = [self._hidden(tool) for tool in extras.tools] or None
        variables = {**self._hidden(extras.variables), **self._names, "tools": tools}
        token_ids = self._encoder.encode_rendered(self._template.render(hidden, variables))
        if not token_ids:
            raise IntegrityError(
                f"the chat template in {self._template.path} writes nothing that the model could answer",
                "`--raw` goes without a template",
            )
        return token_ids

    def _hidden(self, value: Any) -> Any:
        """A JSON value with the control tokens' names hidden in all its texts, as in a message's."""
        if isinstance(value, str):
            return self._encoder.hide(well_formed(value))
        if isinstance(value, Mapping):
            return {key: self._hidden(one) for key, one in value.items()}
        return [self._hidden(one) for one in value] if isinstance(value, list) else value

    def encode_fim(self, before: str, after: str) -> list[int]:
        raise UsageError(
            "a tokenizer.json does not say how text is filled in",
            "take a model with Mistral's own tokenizer file, like Codestral",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.stream().decode(token_ids)

    def stream(self, *, continues_text: bool = False) -> StreamDecoder:
        return StreamDecoder(self.token_bytes, drop_space=self._drops_space and not continues_text)

    def control_name(self, token_id: int) -> str | None:
        return self._encoder.piece(token_id) if token_id in self._special_ids else None

    def render(self, token_ids: Sequence[int]) -> str:
        return self._encoder.render(token_ids)

    def token_bytes(self, token_id: int) -> bytes | None:
        piece = self._encoder.piece(token_id)
        return None if piece is None or token_id in self._special_ids else self._bytes_of_piece(piece)


class _GuardedEncoder:
    """A tokenizer in which no text can name a control token.

    A template writes control tokens and messages into one string, which is then tokenized: `<|im_end|>` in a
    message would end it. So no control token is recognized by its own name here. Each has a second name,
    which begins with a number drawn at random when the tokenizer is loaded, and what the template itself
    wrote is renamed before it is tokenized. Everything else is tokenized as ever.

    Control tokens are those that tokenizer.json calls special and those that a template names, by itself or
    by variable (`template_names`): many a fine-tune does not call its `<|im_start|>` special. The template
    does not see those inside messages.
    """

    def __init__(self, encoder: Encoder, template_names: str) -> None:
        self._encoder = encoder
        self._nonce = secrets.token_hex(8)
        added = encoder.get_added_tokens_decoder()
        controls = {i: token for i, token in added.items() if _is_control(token, template_names)}
        # Longest first, as the tokenizer itself prefers them.
        self._names = sorted((token.content for token in controls.values()), key=len, reverse=True)
        self._any_name = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._any_mark = re.compile(rf"{self._nonce}-(\d+)-")

        encoder.encode_special_tokens = True  # special tokens are no longer recognized in text
        encoder.add_special_tokens(list(controls.values()))
        encoder.add_tokens([self._renamed(token) for token in controls.values()])
        self._ids_by_second_id = {
            encoder.token_to_id(self._nonce + token.content): token_id for token_id, token in controls.items()
        }

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them a control token's."""
        try:
            ids = self._encoder.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            message = f"this text of {len(text)} characters cannot be tokenized: {error}"
            raise MistralError(message) from error
        return [self._ids_by_second_id.get(token_id, token_id) for token_id in ids]

    def hide(self, text: str) -> str:
        """A message's text for the template, with a mark in place of each control token's name."""
        return self._any_name.sub(lambda name: f"{self._nonce}-{self._names.index(name[0])}-", text)

    def encode_rendered(self, rendered: str) -> list[int]:
        """The ids of what a template wrote around messages that were hidden."""
        renamed = self._any_name.sub(lambda name: self._nonce + name[0], rendered)
        return self.encode(self._any_mark.sub(lambda mark: self._names[int(mark[1])], renamed))

    def piece(self, token_id: int) -> str | None:
        """The token of that id as tokenizer.json writes it, None when there is none."""
        if token_id < 0 or token_id in self._ids_by_second_id:
            return None
        return self._encoder.id_to_token(token_id)

    def render(self, token_ids: Sequence[int]) -> str:
        """The text of the ids with the names of special tokens in it."""
        return self._encoder.decode(list(token_ids), skip_special_tokens=False)

    def _renamed(self, token: AddedToken) -> AddedToken:
        return AddedToken(
            self._nonce + token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
        )


def _is_control(token: AddedToken, template_names: str) -> bool:
    """Whether no text may name the token: it is special, or a template has it and it is not just a word."""
    plain = token.content.isspace() or token.content.isalnum()
    return token.special or (token.content in template_names and not plain)


def _read(path: Path) -> Encoder:
    try:
        encoder = Encoder.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise IntegrityError(f"{path} is no readable tokenizer: {error}", "pull the model again") from error
    # What a training script set for its batches would cut and fill prompts here.
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like: each a string, or a description of the token that has it as its content."""
    names = {key: config.get(key) for key in _NAMED_TOKENS}
    strings = {key: name.get("content") if isinstance(name, dict) else name for key, name in names.items()}
    return {key: name for key, name in strings.items() if isinstance(name, str)}


def _token_id(encoder: Encoder, names: Mapping[str, str], key: str) -> int | None:
    return encoder.token_to_id(names[key]) if key in names else None


def _begin_id(encoder: Encoder, config: Mapping[str, Any], names: Mapping[str, str]) -> int | None:
    """The id of `bos_token` if texts begin with it: by configuration, else as tokenizer.json does it."""
    bos_id = _token_id(encoder, names, "bos_token")
    begins = config.get("add_bos_token")
    if begins is None:
        begins = encoder.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    return bos_id if begins else None


def _decoding(encoder: Encoder, path: Path) -> tuple[Callable[[str], bytes], bool]:
    """What bytes a piece stands for, and whether the first piece of a text begins with a space too many."""
    state = json.loads(encoder.decoder.__getstate__()) if encoder.decoder else {"type": "nothing"}
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_bytes, False
    marks_spaces = {"String": SPACE_MARK} in [step.get("pattern") for step in steps] or "Metaspace" in kinds
    if marks_spaces and len(kinds) == len(set(kinds) & _SENTENCEPIECE_STEPS):
        drops_space = any(
            step.get("start") or step.get("prepend_scheme", "never") != "never" for step in steps
        )
        return partial(piece_bytes, byte_fallback="ByteFallback" in kinds), drops_space
    raise IntegrityError(
        f"{path} decodes with {' and '.join(kinds)}, which mistral cannot do piece by piece",
        "byte-level and SentencePiece decoders are known",
    )
