"""Locks on open files, which end with the process that has them."""

import fcntl


def try_lock(descriptor: int) -> bool:
    """Whether the file is now ours until it is closed; where a file system has no locks, it is taken to be."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
