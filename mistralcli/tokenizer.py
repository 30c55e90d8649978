"""Text to token ids and back: one interface, and which of a checkpoint's tokenizer files stands behind it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mistralcli.chat_template import find_template
from mistralcli.conversation import NO_EXTRAS, ChatExtras, Conversation
from mistralcli.detokenizer import StreamDecoder
from mistralcli.errors import IntegrityError
from quant.files import MISTRAL_TOKENIZERS, matches

__all__ = ["StreamDecoder", "Tokenizer", "load_fitting_tokenizer", "load_tokenizer"]


class Tokenizer(Protocol):
    """What the session needs of a tokenizer.

    `eos_ids` end a text; a checkpoint's configuration may have more. `bos_id` begins one, None where none does.
    `family` is "tekken", "spm" (SentencePiece) or "hf" (tokenizer.json). `version` is that of Mistral's chat
    format, "v1" to "v15"; with tokenizer.json it is "jinja" where there is a chat template and "none" where
    there is none.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    family: str
    version: str

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with what looks like a control token in it as text.

        `bos` and `eos` put the tokenizer's own around it. Nothing else does: a chat's come from its format.
        """
        ...

    def encode_chat(self, conversation: Conversation, extras: ChatExtras = NO_EXTRAS) -> list[int]:
        """The ids that ask for the next assistant message, or for the rest of an open one (`prefix`).

        Messages are text, as in `encode`. Raises UsageError for a conversation, or extras, that the format refuses.
        """
        ...

    def encode_fim(self, before: str, after: str) -> list[int]:
        """The ids that ask for what is missing between two texts ("fill in the middle").

        Raises UsageError where the tokenizer has no such format.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids; control tokens and ids that the tokenizer does not have add nothing to it."""
        ...

    def stream(self, *, continues_text: bool = False) -> StreamDecoder:
        """A decoder for the ids of one completion as they arrive.

        The space that SentencePiece puts before a text's first word is dropped, unless the completion
        `continues_text` (a raw prompt, an open assistant message) and the space is one between two words.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes that an id adds to a text; None for a control token, and for an id that there is not."""
        ...

    def control_name(self, token_id: int) -> str | None:
        """A control token's name, like `[INST]`; None for any other."""
        ...

    def render(self, token_ids: Sequence[int]) -> str:
        """The ids as the model receives them, control tokens by name; SentencePiece's as pieces (`▁a`)."""
        ...


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `directory`.

    tekken.json comes before tokenizer.model before tokenizer.json: Mistral's own files, through Mistral's own
    library, are what its models were trained with. But a fine-tune copies them along even when it was trained
    on another chat format; so a checkpoint with a chat template that does not write Mistral's `[INST]` is
    read through its tokenizer.json.

    Raises:
        IntegrityError: no tokenizer file is there, it cannot be read, or tokenizer.json alone would do.
    """
    template = find_template(directory)
    mistral_file = _mistral_file(directory)
    hugging_face_file = directory / "tokenizer.json"
    if mistral_file is not None and (template is None or template.writes_mistral_format):
        from mistralcli.mistral_tokenizer import MistralTokenizer

        return MistralTokenizer(mistral_file)
    if hugging_face_file.is_file():
        from mistralcli.hf_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(directory, template)
    if mistral_file is not None:
        raise IntegrityError(
            f"{directory} has a chat template of its own but no tokenizer.json that holds its control tokens",
            "save the model's tokenizer with transformers' AutoTokenizer, which writes tokenizer.json",
        )
    raise IntegrityError(
        f"{directory} has no tokenizer: neither tekken.json nor tokenizer.model nor tokenizer.json",
        "pull the model again",
    )


def load_fitting_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """As `load_tokenizer`, for a model of that many tokens; IntegrityError too where the tokenizer has more."""
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > vocab_size:
        raise IntegrityError(
            f"the tokenizer of {directory} has {tokenizer.vocab_size} tokens and the model {vocab_size}",
            "tokenizer and weights are not of the same model: pull it again",
        )
    return tokenizer


def _mistral_file(directory: Path) -> Path | None:
    """tekken.json, else a SentencePiece model, preferably one whose name ends with its version, the newest."""
    files = [
        path for path in directory.glob("*") if matches(path.name, MISTRAL_TOKENIZERS) and path.is_file()
    ]
    return max(
        files,
        key=lambda path: (path.name == "tekken.json", path.name != "tokenizer.model", path.name),
        default=None,
    )
