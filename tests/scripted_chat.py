"""A chat whose model and user follow a script, so that a test decides what is said and what goes wrong."""

from dataclasses import dataclass, field

from mistralcli.cli.chat.repl import step
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.errors import MistralError
from mistralcli.session import Completion, StopScanner


class WordDecoder:
    """Ids are the words themselves."""

    def push(self, token_id):
        return token_id

    def flush(self):
        return ""


class ScriptedSession:
    """Answers with what it is given: the words of an answer, or an exception at any place."""

    def __init__(self, *answers):
        self.name = "scripted"
        self.max_seq_len = 512
        self.cache_bytes = 5_000_000
        self.asked = []
        self._answers = list(answers)

    def complete_chat(self, conversation, params, *, max_tokens):
        self.asked.append(conversation)
        words = self._answers.pop(0)
        if isinstance(words, MistralError):
            raise words
        ids = play(words, max_tokens)
        return Completion([1, 2, 3, 4], ids, WordDecoder(), StopScanner(()), n_cached=1, seed=7)


def play(words, max_tokens):
    for word in words[:max_tokens]:
        if isinstance(word, BaseException):
            raise word
        yield word
    return "stop" if max_tokens is None else "length"


@dataclass
class ScriptedTerminal:
    """Types the inputs, then Ctrl-D; keeps what it is shown and the drafts that it is offered."""

    inputs: list = field(default_factory=list)
    shown: str = ""
    notes: list = field(default_factory=list)
    drafts: list = field(default_factory=list)

    def read(self, draft):
        self.drafts.append(draft)
        if not self.inputs:
            raise EOFError
        text = self.inputs.pop(0)
        if isinstance(text, BaseException):
            raise text
        return text

    def write(self, text):
        self.shown += text

    def note(self, message):
        self.notes.append(message)


def chat_with(*answers):
    return Chat(ScriptedSession(*answers), ScriptedTerminal())


def after(chat, *inputs, state=None):
    state = state or ChatState()
    for text in inputs:
        state = step(chat, state, text)
    return state


def said(state):
    return [(m.role, m.content) for m in state.conversation.messages]
