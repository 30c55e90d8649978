"""The terminal of a chat, by prompt_toolkit: editing, history across sessions, completion, a toolbar, live Markdown."""

import asyncio
import os
import sys
import textwrap
from collections.abc import Callable
from typing import NoReturn

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session, get_app, run_in_terminal
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_completions
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.dimension import Dimension
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from mistralcli.cli import console
from mistralcli.cli.chat.completion import ChatCompleter, complete
from mistralcli.cli.chat.editor import edit_text
from mistralcli.cli.chat.history import open_history
from mistralcli.cli.chat.inputs import is_open
from mistralcli.cli.chat.loading import LoadedModel
from mistralcli.cli.chat.repl import run_repl
from mistralcli.cli.chat.screen import (
    CLOSED,
    Stream,
    answer_stream,
    echo,
    ending_by_signals,
    interrupts_after,
    is_gone,
    prompt_input,
    prompt_output,
)
from mistralcli.cli.chat.sessions import SessionStore
from mistralcli.cli.chat.state import Chat, ChatState
from mistralcli.errors import MistralError

_STYLE = Style.from_dict(
    {
        "prompt": "ansimagenta bold",  # bright green, as bold green often is, cannot be read on white
        "introduction": "ansidefault nobold dim",
        "bottom-toolbar": "noreverse dim",
    }
)
_LOOK_EVERY_S = 0.1
_MENU_ROWS = 6
_KEPT = "(what you have typed is in the history: the Up key has it in the next chat)"


def chat_at_terminal(model: LoadedModel, store: SessionStore, state: ChatState, *, plain: bool) -> None:
    """Chat with whoever sits at the terminal, as `run_repl` says; SIGTERM, SIGHUP and a closed terminal leave too.

    The prompt is drawn on stderr when stdout is a file or a pipe, which then gets the answers alone. A terminal that
    cannot show a line beneath the prompt gets its prompt when the model is loaded.

    Raises:
        MistralError: the model cannot be loaded.
    """
    try:
        with (
            ending_by_signals(),
            create_app_session(input=prompt_input(), output=prompt_output()),
            echo(not console.is_smart_terminal(sys.stdin)),
        ):
            if not console.is_smart_terminal(sys.stdin):
                model.session()
            history = open_history(user_state_path("mistral") / "history")
            run_repl(Chat(model, PromptTerminal(history, model, plain=plain), store), state)
    except SystemExit as end:
        if model.is_loading():
            _end_now(end.code)
        raise
    if model.is_loading():
        _end_now(0)


def _end_now(code: object) -> NoReturn:
    """End while the model is loading, which cannot be stopped; Python would abort when it pulls down what that uses."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


class PromptTerminal:
    """Reads with prompt_toolkit, and writes answers to stdout and notes to stderr (see `console`)."""

    def __init__(self, history: History, model: LoadedModel, *, plain: bool) -> None:
        self._model = model
        self._plain = plain
        self._stream: Stream | None = None
        self._toolbar: Callable[[], str] = str
        self._prompt: PromptSession[str] = PromptSession(
            self._message,
            prompt_continuation=lambda width, line, n_wraps: "" if n_wraps else "... ",
            multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
            key_bindings=_key_bindings(),
            history=history,
            completer=ChatCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.MULTI_COLUMN,
            enable_suspend=True,
            bottom_toolbar=self._bottom,
            style=_STYLE,
        )
        for window in self._prompt.layout.find_all_windows():
            if window.content is self._prompt.layout.current_control:
                window.height = _height

    def read(self, draft: str, toolbar: Callable[[], str]) -> str:
        """One input. Ctrl-C clears the line, and pressed again on the empty one raises KeyboardInterrupt.

        A dumb terminal could not show the draft, so it is not offered there.

        Raises:
            MistralError: the chat's first model cannot be loaded. What has been typed is in the history then.
            SystemExit: a signal came, or the terminal is gone. It is, too.
        """
        self._toolbar = toolbar
        text = draft if console.is_smart_terminal(sys.stdin) else ""
        cleared = False
        while True:
            self._leave_if_reported()
            try:
                return _encodable(self._prompt.prompt(default=text, pre_run=self._follow_loading))
            except KeyboardInterrupt:
                if cleared and not self._prompt.default_buffer.text:
                    raise
            except (EOFError, OSError, MistralError, SystemExit) as error:
                is_closed = is_gone(sys.stdin.fileno())
                if is_closed or not isinstance(error, EOFError):
                    self._keep_typed()
                if is_closed:
                    raise SystemExit(CLOSED) from None
                raise
            finally:
                self._model.introduced |= self._model.ready()
            text, cleared = "", True
            self.note("(Ctrl-C again or Ctrl-D leaves)")

    def write(self, text: str) -> None:
        """Ctrl-C waits until the piece is shown whole."""
        if self._stream is None:
            self._stream = answer_stream(plain=self._plain)
        with interrupts_after():
            self._stream.write(text)

    def end_answer(self) -> None:
        if self._stream is not None:
            with interrupts_after():
                self._stream.close()
            self._stream = None

    def note(self, message: str) -> None:
        console.note(message)

    def edit(self, text: str) -> str | None:
        with echo(True):
            return edit_text(text)

    def _message(self) -> StyleAndTextTuples:
        """The prompt, and above the first one what there is to know of the model, which grows while it loads."""
        prompt: StyleAndTextTuples = [("", "\n"), ("class:prompt", ">>> ")]
        if self._model.introduced:
            return prompt
        return [("class:introduction", _wrapped(self._model.introduction())), ("", "\n"), *prompt]

    def _bottom(self) -> str:
        failure = self._model.failure()
        if failure is not None:
            return _first_line(getattr(failure, "message", "") or f"{failure}")
        return _first_line(self._model.progress() or self._toolbar())

    def _follow_loading(self) -> None:
        """Begin to load once the prompt is drawn, and draw it anew as that goes on."""
        app = self._prompt.app

        async def follow() -> None:
            self._model.begin()
            while self._model.is_loading():
                await asyncio.sleep(_LOOK_EVERY_S)
                app.invalidate()
            failure = self._model.failure()
            if failure is not None and self._model.is_first and app.is_running:
                app.exit(exception=failure)

        app.create_background_task(follow())

    def _leave_if_reported(self) -> None:
        """Without its first model a chat cannot go on; the error has been shown in answer to a message."""
        failure = self._model.failure()
        if self._model.is_first and failure is not None and self._model.failure_is_reported():
            self.note(_KEPT)
            raise SystemExit(failure.exit_code if isinstance(failure, MistralError) else 1)

    def _keep_typed(self) -> None:
        text = self._prompt.default_buffer.text
        if text.strip():
            self._prompt.history.append_string(_encodable(text))
            self.note(_KEPT)


def _height() -> Dimension:
    """Of what is typed: half the screen, so that an error which gives a long message back stays in sight.

    While Tab offers something there is room for that below.
    """
    app = get_app()
    rows = app.output.get_size().rows
    if app.is_done:
        return Dimension(max=rows)
    most = max(1, rows // 2)
    return Dimension(min=min(most, _MENU_ROWS) if app.current_buffer.complete_state else 1, max=most)


def _encodable(text: str) -> str:
    """`text` with a question mark for each byte that was typed or pasted and is not UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _wrapped(text: str) -> str:
    """Lines that fit the terminal: prompt_toolkit cuts those above the prompt off."""
    width = max(20, get_app().output.get_size().columns)
    lines = (textwrap.wrap(line, width) for line in console.printable(text).splitlines())
    return "\n".join(part for line in lines for part in line)


def _first_line(text: str) -> str:
    return console.printable(text).partition("\n")[0]


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")  # which is what Alt-Enter sends
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("tab", filter=~has_completions)
    def _(event: KeyPressEvent) -> None:
        complete(event.current_buffer)

    @bindings.add("c-g")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer

        def edit() -> None:
            try:
                text = edit_text(buffer.text)
            except MistralError as error:
                console.show_error(error)
            else:
                if text is not None:
                    buffer.document = Document(text)

        async def edit_outside() -> None:
            await run_in_terminal(edit)

        event.app.create_background_task(edit_outside())

    return bindings
