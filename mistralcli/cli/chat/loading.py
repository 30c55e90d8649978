"""The model of a chat, loaded in a thread behind the prompt, so that the user can type meanwhile.

Nothing here imports torch before the thread does: that import alone takes longer than a prompt may.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mistralcli import store
from mistralcli.cli import console
from mistralcli.cli.answers import ModelChoice, choose_model
from mistralcli.config import read_config
from mistralcli.inventory import stored_scheme
from mistralcli.run_options import SessionOptions
from mistralcli.units import size_text
from quant.files import STEMS, weight_files

if TYPE_CHECKING:
    from mistralcli.session import Session


class LoadedModel:
    """The model that answers. It is loaded from `begin` on, or from when it is first asked for."""

    def __init__(self, choice: ModelChoice, options: SessionOptions) -> None:
        """Raises MistralError where the model's configuration cannot be used."""
        read_config(choice.directory)
        self._options = options
        self._loading = _Loading(choice)
        self.is_first = True
        """Whether it is the one that the chat began with."""
        self.introduced = False
        """Whether the user has seen what `introduction` says."""

    @property
    def name(self) -> str:
        """What names it from anywhere: a path is absolute."""
        choice = self._loading.choice
        return str(choice.directory.absolute()) if Path(choice.name) == choice.directory else choice.name

    @property
    def shown_name(self) -> str:
        """As the user named it."""
        return self._loading.choice.name

    def begin(self) -> None:
        """Load it in a thread, unless that has begun."""
        if self._loading.thread is None:
            # A daemon, so that the process can end before it: see `is_loading`.
            self._loading.thread = threading.Thread(
                target=_load, args=(self._loading, self._options), name="loading", daemon=True
            )
            self._loading.thread.start()

    def is_loading(self) -> bool:
        """Whether the thread runs. Python must not be finalized then: that aborts, if the thread is in C++ code."""
        return self._loading.thread is not None and not self._loading.ended.is_set()

    def ready(self) -> bool:
        """Whether `session` returns at once."""
        return self._loading.session is not None

    def failure(self) -> BaseException | None:
        """Why it could not be loaded."""
        return self._loading.failure

    def session(self) -> "Session":
        """The session, waited for with a progress line on stderr where that is a terminal.

        Raises:
            MistralError: what loading raised.
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; the loading goes on.
        """
        self.begin()
        loading = self._loading
        was_waited_for = not loading.ended.is_set()
        if was_waited_for:
            with console.progress(f"loading {self.shown_name}") as update:
                while not loading.ended.wait(0.1):
                    update(loading.done_bytes, loading.total_bytes or None)
        if loading.failure is not None:
            loading.is_reported = True
            raise loading.failure
        assert loading.session is not None
        if was_waited_for and not self.introduced:
            self.introduced = True
            console.note(self.introduction())
        return loading.session

    def failure_is_reported(self) -> bool:
        """Whether `session` has raised it."""
        return self._loading.is_reported

    def describe(self) -> str:
        """One line: model, scheme, device, context and memory, as far as they are known already."""
        session = self._loading.session
        if session is not None:
            return session.describe()
        choice = self._loading.choice
        scheme = stored_scheme(choice.directory) or "of an unknown type"
        return f"{choice.name} ({scheme}), weights {size_text(_weights_bytes(choice.directory))}"

    def introduction(self) -> str:
        """What a user is to know of it before the first answer: what loading had to say, and `describe`."""
        return "\n".join((*self._loading.notes, self.describe()))

    def progress(self) -> str:
        """How far loading is, in a line; empty when it is over."""
        loading = self._loading
        if loading.ended.is_set():
            return ""
        if not loading.total_bytes:
            return f"loading {self.shown_name}"
        done = f"{100 * loading.done_bytes // loading.total_bytes} % of {size_text(loading.total_bytes)}"
        return f"loading {self.shown_name}: {done}"

    def switch(self, name: str) -> None:
        """Load another model in place of this one, whose memory is freed first.

        Raises:
            MistralError: there is no such model, or its configuration cannot be used; the old one stays.
        """
        choice = choose_model(name, quiet=True)
        read_config(choice.directory)
        before, self._loading = self._loading, _Loading(choice)
        self.is_first, self.introduced = False, False
        self._loading.after = before
        before.is_cancelled, before.session = True, None
        self.begin()


class _CancelledError(Exception):
    """Nobody wants the model any more that is being loaded."""


@dataclass
class _Loading:
    """One loading: the thread writes, the others read."""

    choice: ModelChoice
    thread: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    after: "_Loading | None" = None
    """What must have ended before, since there may not be memory for both."""
    session: "Session | None" = None
    failure: BaseException | None = None
    is_reported: bool = False
    is_cancelled: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def update(self, done_bytes: int, total_bytes: int) -> None:
        if self.is_cancelled:
            raise _CancelledError
        self.done_bytes, self.total_bytes = done_bytes, total_bytes


def _load(loading: _Loading, options: SessionOptions) -> None:
    """What the thread does."""
    try:
        _wait_for_memory(loading)
        from mistralcli.session import open_session

        choice = loading.choice
        session = open_session(
            choice.directory,
            options,
            name=choice.name,
            on_progress=loading.update,
            on_note=loading.notes.append,
        )
        store.note_use(choice.directory)
        if not loading.is_cancelled:
            loading.session = session
    except BaseException as error:  # noqa: BLE001 - whoever asks for the session gets it
        loading.failure = error
    finally:
        loading.ended.set()


def _wait_for_memory(loading: _Loading) -> None:
    """Until the loading before has ended, and what it took is given back."""
    before, loading.after = loading.after, None
    if before is None or before.thread is None:
        return
    before.thread.join()
    before.session = None
    del before

    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _weights_bytes(directory: Path) -> int:
    """Bytes of the files that the weights are in."""
    names = next(filter(None, (weight_files(directory, stem) for stem in STEMS)), [])
    return sum((directory / name).stat().st_size for name in names)
