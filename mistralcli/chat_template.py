"""The Jinja chat template that a fine-tune brings with it: where it is found, and how it is rendered."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistralcli.config import read_json
from mistralcli.conversation import CONVERSATION_RULE, Message
from mistralcli.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_SOURCE_CHARS = 2**19
"""The longest template that is compiled; those in circulation have thousands, at most 50,000."""

MAX_RENDERED_CHARS = 2**26
"""The longest text that a template may write: far more than any context holds."""

_GIVEN = {"messages", "add_generation_prompt"}


@dataclass(frozen=True)
class ChatTemplate:
    """The source of a Jinja template and the file that it is from; compiled when it is first rendered."""

    source: str
    path: Path

    @property
    def writes_mistral_format(self) -> bool:
        """Whether this is a rendering of Mistral's own chat format, which mistral-common knows better."""
        return "[INST]" in self.source

    def render(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """The text that asks the model for the next assistant message, or to go on with an open one.

        Args:
            messages: at least one; an assistant message that comes last must be open (`prefix`).
            variables: what the template sees beside the messages: `bos_token`, `tools` and the like.
        Raises:
            UsageError: the template refuses these messages, or a variable has the name of what it is given anyway.
            IntegrityError: the template is broken, or takes too much time, memory or room.
        """
        _check_answerable(messages)
        if taken := sorted(_GIVEN & variables.keys()):
            raise UsageError(f"a chat template's variable cannot be named {taken[0]}", "choose another name")
        shown = [{"role": message.role, "content": message.content} for message in messages]
        if messages[-1].role != "assistant":
            return self._write(messages=shown, add_generation_prompt=True, **variables)
        end = secrets.token_hex(8)
        # The blank after the mark shows whether the template trims what it is given.
        shown[-1]["content"] += f"{end} "
        return _cut_at(end, self._write(messages=shown, add_generation_prompt=False, **variables))

    def _write(self, **variables: object) -> str:
        from mistralcli.template_sandbox import TemplateRefusalError, bounded

        try:
            with bounded():
                written = self._compiled.generate(**{"tools": None, "documents": None} | variables)
                return "".join(_limited(written))
        except TemplateRefusalError as error:
            message = f"the chat template refuses this conversation: {error}"
            raise UsageError(message, CONVERSATION_RULE) from error
        except Exception as error:  # a foreign program can fail in any way
            reason = str(error) or type(error).__name__
            message = f"the chat template in {self.path} fails: {reason}"
            raise IntegrityError(message, "`--raw` goes without a template") from error

    @cached_property
    def _compiled(self) -> "Template":
        from mistralcli.template_sandbox import sandbox

        if len(self.source) > MAX_SOURCE_CHARS:
            raise ValueError(f"its {len(self.source):,} characters are more than {MAX_SOURCE_CHARS:,}")
        return sandbox().from_string(self.source)


def _check_answerable(messages: Sequence[Message]) -> None:
    if not messages:
        raise UsageError("the conversation has no message to answer", CONVERSATION_RULE)
    if messages[-1].role == "assistant" and not messages[-1].prefix:
        raise UsageError("the conversation ends with a finished answer", CONVERSATION_RULE)


def _limited(parts: Iterator[str]) -> Iterator[str]:
    n_chars = 0
    for part in parts:
        n_chars += len(part)
        if n_chars > MAX_RENDERED_CHARS:
            raise ValueError(f"it writes more than {MAX_RENDERED_CHARS:,} characters")
        yield part


def _cut_at(end: str, text: str) -> str:
    """What the template wrote up to the end of the open message."""
    before, found, after = text.rpartition(end)
    if not found:
        raise UsageError("the chat template leaves out the open assistant message", CONVERSATION_RULE)
    return before if after.startswith(" ") else before.rstrip()


def find_template(directory: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint, None when it brings none.

    It is in chat_template.jinja, chat_template.json or tokenizer_config.json, the first that has one; of
    several with names it is "default". Raises IntegrityError for a file that cannot be read.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(_read_text(path), path)
    for path in (directory / "chat_template.json", directory / "tokenizer_config.json"):
        source = _default(read_json(path).get("chat_template"), path) if path.is_file() else None
        if source is not None:
            return ChatTemplate(source, path)
    return None


def _default(value: Any, path: Path) -> str | None:
    """The template in `value`: a string, or a list of {"name": …, "template": …}."""
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise IntegrityError(f"the chat template in {path} must be a string, not a {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", "pull the model again") from error
