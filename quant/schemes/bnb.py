"""The bitsandbytes library, imported when a scheme of its kind is first used: that takes about 4 s."""

import logging
from types import ModuleType


def bitsandbytes() -> ModuleType:
    """The library, its warnings off: it has one for an optional package and one for every matmul."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
