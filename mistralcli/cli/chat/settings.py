"""What `/set` changes and a saved chat holds: the flags of sampling, with their checks."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from mistralcli.cli.chat.state import ChatState
from mistralcli.errors import UsageError

Value = int | float | list[str] | None


@dataclass(frozen=True)
class Setting:
    """A number, or a list of texts; an optional number can also be None, written `none`."""

    kind: type[int] | type[float] | type[list[str]]
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of the right kind; JSON also has true, NaN and integers without end."""
        if value is None or isinstance(value, bool):
            return value is None and self.optional
        if self.kind not in (int, float):
            return isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        right_kind = isinstance(value, int) or (self.kind is float and isinstance(value, float))
        return right_kind and bool(abs(value) < 2**63)

    def describe(self) -> str:
        if self.kind not in (int, float):
            return "texts that are not empty, or none"
        return ("a whole number" if self.kind is int else "a number") + (" or none" if self.optional else "")


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "temperature": Setting(float),
        "top_p": Setting(float),
        "top_k": Setting(int),
        "min_p": Setting(float),
        "repeat_penalty": Setting(float),
        "seed": Setting(int, optional=True),
        "max_tokens": Setting(int, optional=True),
        "stop": Setting(list[str]),
    }
)


def settings_of(state: ChatState) -> dict[str, Value]:
    """The present value of every setting, as JSON has it."""
    ours: dict[str, Value] = {"max_tokens": state.max_tokens, "stop": list(state.stop)}
    return {name: ours[name] if name in ours else getattr(state.params, name) for name in SETTINGS}


def with_setting(state: ChatState, name: str, value: Any) -> ChatState:
    """`state` with one setting changed. Raises UsageError for an unknown name or an impossible value."""
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
        did_you_mean = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"there is no setting {name!r}", f"{did_you_mean}the settings are {', '.join(SETTINGS)}"
        )
    if not SETTINGS[name].accepts(value):
        raise UsageError(f"{name} must be {SETTINGS[name].describe()}, not {value!r}")
    if name == "stop":
        return replace(state, stop=tuple(value))
    if name == "max_tokens":
        if value is not None and value < 1:
            raise UsageError(f"max_tokens is {value}; it must be 1 or more")
        return replace(state, max_tokens=value)
    return replace(state, params=replace(state.params, **{name: value}))
