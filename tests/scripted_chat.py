"""A chat whose model and user follow a script, so that a test decides what is said and what goes wrong."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from mistralcli.cli.chat.repl import run_repl, step
from mistralcli.cli.chat.sessions import SessionStore
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.errors import ContextOverflowError, MistralError, ModelNotFoundError
from mistralcli.session import Completion, StopScanner


class WordDecoder:
    """Ids are the words themselves."""

    def push(self, token_id):
        return token_id

    def flush(self):
        return ""


class WordTokenizer:
    """Words and line ends are tokens; a chat's format is a mark before each message, and one for the answer to come."""

    def encode(self, text, **options):
        return re.findall(r"\s*\S+|\s+$", text)

    def encode_chat(self, conversation):
        ids = [token for m in conversation.messages for token in (f"<{m.role}>", *self.encode(m.content))]
        return ids if conversation.messages[-1].prefix else [*ids, "<assistant>"]


class ScriptedSession:
    """Answers with what it is given: the words of an answer, or an exception at any place."""

    def __init__(self, *answers, n_ctx=512, window=None):
        self.name = "scripted"
        self.max_seq_len = n_ctx
        self.cache_bytes = 5_000_000
        self.tokenizer = WordTokenizer()
        self.config = SimpleNamespace(sliding_windows=(window, window))
        self.engine = SimpleNamespace(token_ids=[], device=SimpleNamespace(type="none"), cache=NoCache())
        self.asked = []
        self.stops = []
        self._answers = list(answers)

    def complete_chat(self, conversation, params, *, max_tokens, stop):
        self.asked.append(conversation)
        self.stops.append(stop)
        ids = self.tokenizer.encode_chat(conversation)
        if len(ids) >= self.max_seq_len:
            raise ContextOverflowError(f"the prompt has {len(ids)} tokens")
        words = self._answers.pop(0)
        if isinstance(words, MistralError):
            raise words
        pieces = play(words, max_tokens)
        return Completion(ids, pieces, WordDecoder(), StopScanner(stop), n_cached=1, seed=7)


class NoCache:
    """A cache without layers."""

    layers = ()


def play(words, max_tokens):
    for word in words[:max_tokens]:
        if isinstance(word, BaseException):
            raise word
        yield word
    return "stop" if max_tokens is None else "length"


class LoadedScript:
    """A model that is there at once. `others` are the names that `/model` can go to."""

    def __init__(self, session, others=()):
        self.name = session.name
        self.others = others
        self._session = session

    def ready(self):
        return True

    def session(self):
        return self._session

    def describe(self):
        return f"{self.name} on nothing"

    def switch(self, name):
        if name not in self.others:
            raise ModelNotFoundError(f"there is no model {name}")
        self.name = name


@dataclass
class ScriptedTerminal:
    """Types the inputs, then Ctrl-D; keeps what it is shown, the drafts that it is offered, and the toolbars.

    `edits` are what the user makes of texts in an editor.
    """

    inputs: list = field(default_factory=list)
    edits: list = field(default_factory=list)
    shown: str = ""
    notes: list = field(default_factory=list)
    drafts: list = field(default_factory=list)
    toolbars: list = field(default_factory=list)

    def read(self, draft, toolbar):
        self.drafts.append(draft)
        self.toolbars.append(toolbar())
        if not self.inputs:
            raise EOFError
        text = self.inputs.pop(0)
        if isinstance(text, BaseException):
            raise text
        return text

    def write(self, text):
        self.shown += text

    def end_answer(self):
        if not self.shown.endswith("\n"):
            self.shown += "\n"

    def note(self, message):
        self.notes.append(message)

    def edit(self, text):
        return self.edits.pop(0) if self.edits else None


class TemporaryStore(SessionStore):
    """Sessions in a directory that goes with the store."""

    def __init__(self):
        self._holder = TemporaryDirectory()
        super().__init__(Path(self._holder.name))


def chat_with(*answers, directory=None, others=(), **options):
    """`directory`: where its sessions are kept, one of its own without it."""
    store = TemporaryStore() if directory is None else SessionStore(directory)
    model = LoadedScript(ScriptedSession(*answers, **options), others)
    return Chat(model, ScriptedTerminal(), store)


def after(chat, *inputs, state=None):
    state = state or ChatState()
    for text in inputs:
        state = step(chat, state, text)
    return state


def talk(chat, *inputs, state=None):
    """The whole loop, to its end."""
    chat.terminal.inputs = list(inputs)
    run_repl(chat, state or ChatState())


def continued(chat, *answers, **options):
    """Another chat, after the end of this one's process, that goes on with its session: it, and what came of that."""
    chat.store.close()
    other = chat_with(*answers, directory=chat.store.directory, **options)
    return other, other.store.resume(other.store.latest().path)


def said(state):
    return [(m.role, m.content) for m in state.conversation.messages]
