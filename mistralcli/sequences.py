"""What prompts as sequences of ids are compared by."""

from collections.abc import Sequence


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    n_shorter = min(len(one), len(other))
    return next((i for i in range(n_shorter) if one[i] != other[i]), n_shorter)
