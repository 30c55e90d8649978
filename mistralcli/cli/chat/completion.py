"""What Tab completes at the prompt: commands, and what they take: settings, models, files."""

from collections.abc import Iterable

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
    get_common_complete_suffix,
)
from prompt_toolkit.document import Document

from mistralcli.cli.chat.commands import COMMANDS
from mistralcli.cli.chat.settings import SETTINGS
from mistralcli.cli.completion import model_names


class ChatCompleter(Completer):
    """Completes what a command's `argument` says: NAME is a setting or a model, FILE a path, a|b one of these."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        name, space, typed = document.text_before_cursor.partition(" ")
        if not name.startswith("/"):
            return
        if not space:
            yield from _words(name, [f"/{known}" for known in COMMANDS])
        elif command := COMMANDS.get(name.removeprefix("/")):
            kinds = command.argument.replace("[", "").replace("]", "").split()
            yield from self._argument(name.removeprefix("/"), kinds, typed, complete_event)

    def _argument(
        self, name: str, kinds: list[str], typed: str, event: CompleteEvent
    ) -> Iterable[Completion]:
        """`kinds`: what may follow, in order; a file is the last, and its name may have spaces."""
        while len(kinds) > 1 and " " in typed:
            kinds, typed = kinds[1:], typed.partition(" ")[2]
        kind = kinds[0] if kinds else ""
        if kind == "FILE":
            yield from self._paths.get_completions(Document(typed), event)
        elif kind == "NAME":
            yield from _words(typed, model_names(typed) if name == "model" else SETTINGS)
        elif "|" in kind:
            yield from _words(typed, kind.split("|"))


def complete(buffer: Buffer) -> None:
    """What Tab does: the only completion, else what all have in common, else a menu of them.

    At once: prompt_toolkit's own asks behind the key, and Enter could come before the answer.
    """
    document = buffer.document
    event = CompleteEvent(completion_requested=True)
    offered = list(buffer.completer.get_completions(document, event))
    if len(offered) == 1:
        buffer.apply_completion(offered[0])
    elif common := get_common_complete_suffix(document, offered):
        buffer.insert_text(common)
    elif offered:
        buffer.start_completion()


def _words(start: str, words: Iterable[str]) -> Iterable[Completion]:
    known = (word for word in words if word.startswith(start))
    return (Completion(f"{word} ", start_position=-len(start), display=word) for word in known)
