"""Mistral's own tokenizer files, tekken.json and SentencePiece models, through mistral-common.

The library holds the chat formats v1 to v15 as code; it, and no Jinja template, says what Mistral's models
were trained on. Control tokens come from the format alone: text is encoded as text, whatever it looks like.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    ChatMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers import instruct
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, Tokenized, TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as ChatEncoder
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from pydantic import ValidationError

from mistralcli.conversation import (
    CONVERSATION_RULE,
    NO_EXTRAS,
    ChatExtras,
    Conversation,
    Message,
    well_formed,
)
from mistralcli.detokenizer import StreamDecoder, piece_bytes
from mistralcli.errors import IntegrityError, MistralError, UsageError

_ChatEncoder = ChatEncoder[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]

_NO_FIM = "take a model that was trained to, like Codestral"

_VERSIONED_NAME = re.compile(r"\.model\.(v\d+)(?:m\d+)?$")

# The newest first: each version has the pieces of those before it.
_PIECES_OF_VERSIONS = (("[SYSTEM_PROMPT]", "v7"), ("[PREFIX]", "v3"), ("[INST]", "v2"))


class MistralTokenizer:
    """A tekken or SentencePiece tokenizer with the chat format of its version (see `tokenizer.Tokenizer`)."""

    def __init__(self, path: Path) -> None:
        """Read `path`; raises IntegrityError when mistral-common cannot."""
        try:
            self._tokenizer = _read(path)
            self._chat = _chat_encoder(self._tokenizer)
            self.bos_id: int | None = self._tokenizer.bos_id
            self.eos_ids = frozenset({self._tokenizer.eos_id})
        except Exception as error:  # a foreign file can make the library fail in any way
            message = f"{path} is no readable tokenizer: {str(error) or type(error).__name__}"
            raise IntegrityError(message, "pull the model again") from error
        self.vocab_size = self._tokenizer.n_words
        self.family = "tekken" if isinstance(self._tokenizer, Tekkenizer) else "spm"
        self.version = self._tokenizer.version.value

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        try:
            return self._tokenizer.encode(well_formed(text), bos=bos, eos=eos)
        except ValueError as error:
            # tekken's regular expression gives up on a run of some hundred thousand spaces.
            raise MistralError(
                f"this text of {len(text)} characters cannot be tokenized: {error}",
                "shorten what repeats in it, like a very long run of spaces",
            ) from error

    def encode_chat(self, conversation: Conversation, extras: ChatExtras = NO_EXTRAS) -> list[int]:
        if extras.variables:
            raise UsageError(
                f"the chat format {self.version} is no Jinja template, so it has no variables",
                "leave --template-vars out",
            )
        if extras.tools and self.version == "v1":
            raise UsageError("the chat format v1 has no tools", "leave --tools out, or take a newer model")
        messages = [_chat_message(message) for message in conversation.messages]
        try:
            tools = [Tool.model_validate(tool) for tool in extras.tools] or None
            request = ChatCompletionRequest(messages=messages, tools=tools)
            return self._chat.encode_chat_completion(request).tokens
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UsageError(
                f"a tool is not as the chat format wants it: {place}: {first['msg']}",
                "correct the --tools file",
            ) from error
        except MistralCommonException as error:
            message = f"the chat format {self.version} refuses this conversation: {error.message}"
            raise UsageError(message, CONVERSATION_RULE) from error
        except ValueError as error:
            raise MistralError(f"this conversation cannot be tokenized: {error}") from error

    def encode_fim(self, before: str, after: str) -> list[int]:
        request = FIMRequest(prompt=well_formed(before), suffix=well_formed(after))
        try:
            token_ids = self._chat.encode_fim(request).tokens
        except (MistralCommonException, ValueError) as error:
            raise UsageError(f"this text cannot be filled in: {error}", _NO_FIM) from error
        if (
            self.family == "spm" and self._tokenizer.unk_id in token_ids
        ):  # v2 has the format, and not its tokens
            raise UsageError(f"the tokenizer has no tokens for filling in ({self.version})", _NO_FIM)
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.stream().decode(token_ids)

    def stream(self, *, continues_text: bool = False) -> StreamDecoder:
        return StreamDecoder(self.token_bytes, drop_space=self.family == "spm" and not continues_text)

    def control_name(self, token_id: int) -> str | None:
        tokenizer = self._tokenizer
        is_control = 0 <= token_id < self.vocab_size and tokenizer.is_special(token_id)
        return tokenizer.id_to_piece(token_id) if is_control else None

    def render(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), special_token_policy=SpecialTokenPolicy.KEEP)

    def token_bytes(self, token_id: int) -> bytes | None:
        tokenizer = self._tokenizer
        if (
            not 0 <= token_id < self.vocab_size
            or tokenizer.is_special(token_id)
            or token_id == tokenizer.unk_id
        ):
            return None
        if isinstance(tokenizer, Tekkenizer):
            return tokenizer.id_to_byte_piece(token_id)
        return piece_bytes(tokenizer.id_to_piece(token_id))


def _read(path: Path) -> Tekkenizer | SentencePieceTokenizer:
    if path.suffix == ".json":
        return Tekkenizer.from_file(path)
    if match := _VERSIONED_NAME.search(path.name):
        return SentencePieceTokenizer(path, TokenizerVersion(match[1]))
    # A bare tokenizer.model: its version shows in its pieces (mistral-common would take it for v1).
    pieces = set(SentencePieceTokenizer(path, TokenizerVersion.v1).vocab())
    version = next((version for piece, version in _PIECES_OF_VERSIONS if piece in pieces), "v1")
    return SentencePieceTokenizer(path, TokenizerVersion(version))


def _chat_encoder(tokenizer: Tekkenizer | SentencePieceTokenizer) -> _ChatEncoder:
    """The chat format of the tokenizer's version, without its encoders for images and audio."""
    version = tokenizer.version
    format_class = getattr(instruct, f"InstructTokenizer{version.value.upper()}")
    return _ChatEncoder(
        format_class(tokenizer),
        # "test" is serving without the demand for a model's name.
        validator=get_validator(version, mode=ValidationMode.test),
        request_normalizer=get_normalizer(version, tokenizer.model_settings_builder),
    )


def _chat_message(message: Message) -> ChatMessage:
    content = well_formed(message.content)
    if message.role == "assistant":
        return AssistantMessage(content=content, prefix=message.prefix)
    return SystemMessage(content=content) if message.role == "system" else UserMessage(content=content)
