"""What a check of `mistral doctor` says, and what becomes of a check that itself fails."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mistralcli.errors import MistralError

Status = Literal["ok", "note", "problem"]

REPORT = "this should not happen: report it, with what `mistral doctor --json` prints"


@dataclass(frozen=True)
class Finding:
    """One fact about this machine or installation.

    ok: as it should be. note: worth knowing, and nothing is broken. problem: something will not work; then
    `hint` says what to do.
    """

    name: str
    status: Status
    message: str
    hint: str | None = None

    def __post_init__(self) -> None:
        assert self.hint or self.status != "problem", f"the problem {self.name} has no hint"


@dataclass(frozen=True)
class Context:
    """What the user asked for. `offline`: nothing is sent to the Hub. `flags`: those that settings can have."""

    offline: bool = False
    flags: tuple[str, ...] = ()


Check = Callable[[Context], Iterator[Finding]]


def guarded(name: str, check: Callable[[], Iterable[Finding]], hint: str = REPORT) -> Iterator[Finding]:
    """What `check` finds; when it fails, that is a problem as well. An error's own hint comes before `hint`."""
    try:
        yield from check()
    except MistralError as error:
        yield Finding(name, "problem", error.message, error.hint or hint)
    except Exception as error:  # noqa: BLE001  whatever is broken here, the other checks still run
        yield Finding(name, "problem", f"the check failed: {type(error).__name__}: {error}", hint)
