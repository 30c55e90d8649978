"""Defaults of flags from the environment and from settings files: which there are, what they are, where from.

A flag on the command line counts most, then MISTRAL_CLI_NAME in the environment, then a project's file, then the
user's (`mistralcli.settings`). Which flags can be set is `options.SETTINGS`.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from mistralcli.cli.options import SETTINGS
from mistralcli.demo import DEMO
from mistralcli.errors import MistralError, UsageError
from mistralcli.settings import SettingsFile, Value, defaults_for, read_settings

_PREFIX = "MISTRAL_CLI_"
_REPLACED_BY = {"system": ("raw", "fim", "system_file")}
"""Flags with which a default would be a contradiction; they are the nearer wish."""


@dataclass(frozen=True)
class Setting:
    """A value that is set, and where: a variable's name, or a file's path. `model`: the only one that it is for."""

    key: str
    value: Value
    source: str
    model: str | None = None


def variable(key: str) -> str:
    """The environment variable that sets a flag.

    >>> variable("top_p")
    'MISTRAL_CLI_TOP_P'
    """
    return _PREFIX + key.upper()


def defaults_of(command: Any, info_name: str | None, args: Sequence[str], parent: Any) -> dict[str, Any]:
    """Click's `default_map` for a command: the values for its flags that the command line does not give.

    What is set for one model counts when the command line, the environment or the settings name that model.

    Raises:
        UsageError: a settings file cannot be used, or has a key or a value that no flag has.
    """
    names = {param.name for param in command.params}
    if "--help" in args:
        return {}
    given = command.make_context(info_name, list(args), parent=parent, resilient_parsing=True).params
    files = read_settings()
    model = given.get("named") or given.get("model") or default_model(files)
    found: dict[str, Any] = {} if model is None else {"model": model}
    if (
        "system" in names
    ):  # run and chat, which take all settings, and template, which shows what they would send
        params = {param.name: param for param in command.params}
        for key, setting in effective(files, model).items():
            if key in params and not any(given.get(flag) for flag in _REPLACED_BY.get(key, ())):
                checked(params[key], setting)
                found[key] = as_argument(setting.value)
    return found


def default_model(files: Sequence[SettingsFile]) -> str | None:
    """The model that the nearest file names."""
    return next((file.model for file in files if file.model is not None), None)


def effective(files: Sequence[SettingsFile], model: str | None) -> dict[str, Setting]:
    """Every value that is set for a run of `model`, by its key.

    Raises:
        UsageError: a file has an unknown key.
    """
    names = _names(model)
    found: dict[str, Setting] = {}
    for file in reversed(files):
        refuse_unknown(file)
        found |= {
            key: Setting(key, value, str(file.path)) for key, value in defaults_for(file, names).items()
        }
    return found | {setting.key: setting for setting in from_environment()}


def _names(model: str | None) -> list[str]:
    """What `[models.NAME]` may call a model: as it was named, what that stands for, and that without a revision."""
    from mistralcli import store

    chain = store.known_as(DEMO if model is None else model)
    return [*chain, chain[-1].partition("@")[0]]


def from_environment() -> Iterator[Setting]:
    """What MISTRAL_CLI_… sets; an empty variable sets nothing."""
    for key in SETTINGS:
        if value := os.environ.get(variable(key)):
            yield Setting(key, value, variable(key))


def refuse_unknown(file: SettingsFile) -> None:
    """Raise UsageError where a file sets what is no flag that can be set."""
    for key in (key for table in (file.defaults, *file.models.values()) for key in table):
        if key not in SETTINGS:
            raise UsageError(f"{file.path} sets {key!r}, which is no setting", known_settings(key))


def known_settings(key: str) -> str:
    """A hint for somebody who wrote `key`."""
    near = difflib.get_close_matches(key, SETTINGS, n=1)
    return f"did you mean {near[0]}?" if near else f"the settings are model, {', '.join(SETTINGS)}"


def as_argument(value: Value) -> Any:
    """A value as the command line would have it; a flag without an argument takes true and false."""
    return value if isinstance(value, bool) else str(value)


def checked(param: Any, setting: Setting) -> Any:
    """The value as the command gets it.

    Raises:
        UsageError: it is none for this flag; the message says where it was set.
    """
    value = as_argument(setting.value)
    try:
        if isinstance(value, bool) != bool(param.is_flag) and not (param.is_flag and value in _TRUTHS):
            raise UsageError("it must be true or false" if param.is_flag else "it takes no true or false")
        return param.process_value(typer.Context(typer.core.TyperCommand("settings")), value)
    except (typer.TyperException, MistralError) as error:
        reason = getattr(error, "message", "") or "it is no value for this flag"
        raise UsageError(
            f"{setting.source} sets {setting.key} to {setting.value!r}: {reason}",
            "correct it, or leave it out",
        ) from None


_TRUTHS: Mapping[str, bool] = {"true": True, "false": False}
