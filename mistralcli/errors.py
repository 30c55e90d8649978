"""The errors of the application, on top of `quant.errors`; FACTS' exit codes in one place.

0 done · 1 failure · 2 usage · 3 model missing · 4 authentication or gated · 5 network · 6 disk · 7 memory ·
8 context overflow · 9 integrity · 10 quality gate · 130 Ctrl-C · 141 broken pipe.
"""

from quant.errors import (
    DiskError,
    IntegrityError,
    MistralError,
    NotEnoughMemoryError,
    QualityError,
    UsageError,
)

__all__ = [
    "AccessError",
    "ContextOverflowError",
    "DiskError",
    "IntegrityError",
    "MistralError",
    "ModelNotFoundError",
    "NetworkError",
    "NotEnoughMemoryError",
    "QualityError",
    "UsageError",
]


class ModelNotFoundError(MistralError):
    """No model of that name is here (or, for `pull`, on the Hub)."""

    exit_code = 3


class AccessError(MistralError):
    """The Hub refuses: the repository is gated, or the token is missing or wrong."""

    exit_code = 4


class NetworkError(MistralError):
    """The Hub could not be reached, or answered with something that is not the Hub."""

    exit_code = 5


class ContextOverflowError(MistralError):
    """The prompt leaves no room for one token; it is never cut silently."""

    exit_code = 8
