"""The `quantization_config` of config.json, in the words of each library that writes one."""

import re

from quant.errors import MistralError


def names(key: str, value: object) -> list[str]:
    """A list of names from foreign JSON; null is an empty one."""
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise MistralError(f"{key} in quantization_config is {value!r}, not a list of names")
    return listed


def group_size(value: object) -> int | None:
    """A number of columns, or None for −1, which means whole rows."""
    if type(value) is not int or not (value == -1 or 1 <= value < 1 << 31):
        raise MistralError(f"group_size in quantization_config is {value!r}, not a number of columns")
    return None if value == -1 else value


def covers(skipped: str, module: str) -> bool:
    """Whether a name in a list of modules that stay dense means this one, by the rules of transformers.

    It means modules whose names end with it, the module of that name, and those inside it; it may be a regular
    expression, which matches from the start of the name to the end of one of its parts.
    """
    if module.endswith(skipped):
        return True
    try:
        return re.match(rf"(?:{skipped})(?:(?<=\.)|(?=\.|$))", module) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise MistralError(
            f"{skipped!r} in quantization_config is not a regular expression: {error}"
        ) from error
