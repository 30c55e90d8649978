"""How far a long work has come."""

from collections.abc import Callable


class Progress:
    """Adds up what is done, in bytes or in steps, and passes it on with the total, to whoever wants to know."""

    def __init__(self, report: Callable[[int, int], None] | None, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def advance(self, n: int) -> None:
        self._done += n
        if self._report is not None:
            self._report(self._done, self._total)
