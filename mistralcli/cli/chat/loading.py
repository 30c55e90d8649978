"""The model of a chat, loaded in a thread behind the prompt, so that the user can type meanwhile.

Nothing here imports torch before the thread does: that import alone takes longer than a prompt may.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mistralcli import store
from mistralcli.cli import console
from mistralcli.cli.answers import ModelChoice, choose_model
from mistralcli.config import read_config
from mistralcli.errors import MistralError, NotEnoughMemoryError
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
        # What could not take the place of `_loading`, until that is told.
        self._refused: _Loading | None = None
        self.is_first = True
        """Whether it is the one that the chat began with."""
        self.introduced = False
        """Whether the user has seen what `introduction` says."""

    @property
    def name(self) -> str:
        """What names it from anywhere: a path is absolute."""
        choice = self._settled().choice
        return str(choice.directory.absolute()) if Path(choice.name) == choice.directory else choice.name

    @property
    def shown_name(self) -> str:
        """As the user named it."""
        return self._settled().choice.name

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
        return self._settled().session is not None and self._refused is None

    def failure(self) -> BaseException | None:
        """Why it could not be loaded, or why another one could not take its place, until `session` has raised that."""
        loading = self._settled()
        return (self._refused or loading).failure

    def session(self) -> "Session":
        """The session, waited for with a progress line on stderr where that is a terminal.

        Raises:
            MistralError: what loading raised; once, where the model before is there again.
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; the loading goes on.
        """
        self.begin()
        was_waited_for = self.is_loading()
        if was_waited_for:
            with console.progress(f"loading {self.shown_name}") as update:
                while not self._loading.ended.wait(0.1):
                    update(self._loading.done_bytes, self._loading.total_bytes or None)
        loading = self._settled()
        refused, self._refused = self._refused, None
        if refused is not None:
            raise _told(refused, loading)
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
        return self._settled().is_reported

    def describe(self) -> str:
        """One line: model, scheme, device, context and memory, as far as they are known already."""
        loading = self._settled()
        if loading.session is not None:
            return loading.session.describe()
        choice = loading.choice
        scheme = stored_scheme(choice.directory) or "of an unknown type"
        return f"{choice.name} ({scheme}), weights {size_text(_weights_bytes(choice.directory))}"

    def introduction(self) -> str:
        """What a user is to know of it before the first answer: what loading had to say, and `describe`."""
        return "\n".join((*self._settled().notes, self.describe()))

    def progress(self) -> str:
        """How far loading is, in a line; empty when it is over."""
        loading = self._settled()
        if loading.ended.is_set():
            return ""
        if not loading.total_bytes:
            return f"loading {self.shown_name}"
        done = f"{100 * loading.done_bytes // loading.total_bytes} % of {size_text(loading.total_bytes)}"
        return f"loading {self.shown_name}: {done}"

    def switch(self, name: str) -> None:
        """Load another model in place of this one, which stays until that is loaded where memory allows, and comes back
        where that cannot be loaded.

        Raises:
            MistralError: there is no such model, or its configuration cannot be used; the old one stays.
        """
        choice = choose_model(name, quiet=True)
        read_config(choice.directory)
        present = self._settled()
        self._loading = _Loading(choice, after=present, before=present.before or present)
        present.is_cancelled = True
        self._refused = None
        self.is_first, self.introduced = False, False
        self.begin()

    def _settled(self) -> "_Loading":
        """What answers: the model before, where another one could not take its place."""
        loading = self._loading
        before = loading.before
        if loading.ended.is_set() and loading.failure is not None and before is not None and before.session:
            self._refused, self._loading, self.introduced = loading, before, True
        return self._loading


class _CancelledError(Exception):
    """Nobody wants the model any more that is being loaded."""


@dataclass
class _Loading:
    """One loading: the thread writes, the others read."""

    choice: ModelChoice
    after: "_Loading | None" = None
    """What must have ended before this one begins."""
    before: "_Loading | None" = None
    """What answered last, until this one is loaded: it is gone back to when that fails."""
    thread: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)
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
        if loading.after is not None and loading.after.thread is not None:
            loading.after.thread.join()
        loading.after = None
        if loading.before is not None and not _fits_beside(loading.choice, options, loading.before):
            _free(loading.before)
        session = _opened(loading, options)
        if not loading.is_cancelled:
            loading.session = session
            if loading.before is not None:
                _free(loading.before)
                loading.before = None
    except BaseException as error:  # noqa: BLE001 - whoever asks for the session gets it
        loading.failure = error
        if loading.before is not None and not loading.is_cancelled:
            _restore(loading.before, options)
    finally:
        loading.ended.set()


def _opened(loading: _Loading, options: SessionOptions) -> "Session":
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
    return session


def _fits_beside(choice: ModelChoice, options: SessionOptions, before: _Loading) -> bool:
    """Whether a model gets beside the one before what it would get alone. A limit is for one.

    Raises MistralError where it could not be loaded either way.
    """
    if before.session is None or options.memory_limit is not None:
        return False
    from mistralcli.device import choose_device, room_bytes
    from mistralcli.plan import default_ctx, fitting_plan, requested_plan
    from mistralcli.session import demand_under

    config, device = read_config(choice.directory), choose_device(options.device)
    room = room_bytes(device, None)
    room_alone = room + before.session.plan.total_bytes
    demand = demand_under(options, choice.directory, device, room)
    if demand != demand_under(options, choice.directory, device, room_alone):
        return False
    try:
        if options.ctx is not None:
            return requested_plan(config, demand, options.ctx, room).fits
        return fitting_plan(config, demand, room).ctx == default_ctx(config)
    except NotEnoughMemoryError:
        return False


def _free(loading: _Loading) -> None:
    """Give back what its session takes."""
    loading.session = None

    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _restore(before: _Loading, options: SessionOptions) -> None:
    """Have the model that answered last again; where that fails too, there is none."""
    before.is_cancelled = False
    if before.session is None:
        with suppress(MistralError):
            before.session = _opened(before, options)
    before.ended.set()
    before.failure = None


def _told(refused: _Loading, loading: _Loading) -> BaseException:
    """What is raised for a model that could not take another's place."""
    failure, stays = refused.failure, f"the chat goes on with {loading.choice.name}"
    assert failure is not None
    if not isinstance(failure, MistralError):
        return failure
    hint = f"{failure.hint}; {stays}" if failure.hint else stays
    return type(failure)(f"{refused.choice.name} could not be loaded: {failure.message}", hint)


def _weights_bytes(directory: Path) -> int:
    """Bytes of the files that the weights are in."""
    names = next(filter(None, (weight_files(directory, stem) for stem in STEMS)), [])
    return sum((directory / name).stat().st_size for name in names)
