"""The error family: every failure a user can cause or meet is a `MistralError` with an exit code.

They are raised where the facts are known and shown in one place, `mistralcli.cli.app.main`. The family
lives here because `quant` and `mistralcli` both raise it and `quant` imports nothing of `mistralcli`.
"""

from typing import ClassVar


class MistralError(Exception):
    """One sentence that says what failed and with which values, and a hint that says what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MistralError):
    """The command line asks for something that cannot be: a bad value, or two flags that exclude each other."""

    exit_code = 2


class DiskError(MistralError):
    """The disk is full, or a file cannot be written."""

    exit_code = 6


class NotEnoughMemoryError(MistralError):
    """What was asked for does not fit in memory; the hint says what would."""

    exit_code = 7


class IntegrityError(MistralError):
    """A file is not what it should be: corrupt, truncated, a tensor missing, extra or mis-shaped."""

    exit_code = 9


class QualityError(MistralError):
    """A build or an answer failed the gate that was set for it."""

    exit_code = 10
