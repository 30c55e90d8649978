"""The `quantization_config` of config.json, in the words of each library that writes one."""

from quant.errors import MistralError


def names(key: str, value: object) -> list[str]:
    """A list of names from foreign JSON; null is an empty one."""
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise MistralError(f"{key} in quantization_config is {value!r}, not a list of names")
    return listed
