"""Settings in files: the user's `config.toml`, and a project's `.mistral.toml` in the working directory or above it.

    model = "mistral-7b-instruct-v0.3-int4"     # when none is named
    temperature = 0.2                           # defaults of flags of run and chat

    [aliases]
    small = "mistralai/Ministral-8B-Instruct-2410"

    [models.small]                              # defaults for one model
    system = "Answer in one sentence."

A project's file comes with what somebody else wrote. It can set the same things and nothing else, names models by
name alone, and its aliases do not take the names of models that are here. One that belongs to another user of the
machine is ignored.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from mistralcli.errors import DiskError, UsageError
from mistralcli.whole_file import write_whole

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

PROJECT_FILE = ".mistral.toml"
_LARGEST_BYTES = 1 << 20
_LONGEST_QUOTE = 80
_TABLES = ("aliases", "models")
_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?(?:@[\w./+-]+)?", re.ASCII)
"""OWNER/NAME, or a name alone, with a revision or without."""

Value = str | int | float | bool


@dataclass(frozen=True)
class SettingsFile:
    """What a file sets: `model`, aliases, defaults of flags by their keys, and such defaults for one model."""

    path: Path
    is_project: bool = False
    model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Alias:
    """Another name for a model, and the file that gives it."""

    name: str
    model: str
    file: SettingsFile


def user_path() -> Path:
    """The user's file, there or not: `$XDG_CONFIG_HOME/mistral/config.toml` on Linux."""
    return platformdirs.user_config_path("mistral") / "config.toml"


def project_path() -> Path | None:
    """The nearest project file, in the working directory or above, unless it is another user's."""
    path = nearest_project_file()
    return path if path is not None and is_own(path) else None


def nearest_project_file() -> Path | None:
    """The nearest project file, whoever owns it."""
    try:
        here = Path.cwd()
    except OSError:  # which somebody has removed
        return None
    candidates = (directory / PROJECT_FILE for directory in (here, *here.parents))
    # Path.is_file raises where a directory may not be searched.
    return next((path for path in candidates if os.path.isfile(path)), None)  # noqa: PTH113


def is_own(path: Path) -> bool:
    """Whether a file belongs to this user or to root: in a directory that all can write, anybody can leave one."""
    return not hasattr(os, "getuid") or path.stat().st_uid in (0, os.getuid())


def read_settings() -> list[SettingsFile]:
    """The files that are there, what counts more first: the project's, the user's.

    Raises:
        UsageError: one of them cannot be read, is not TOML, or has what does not belong there.
    """
    project, user = project_path(), user_path()
    files = [] if project is None else [read_file(project, is_project=True)]
    if user.is_file() and (project is None or not user.samefile(project)):
        files.append(read_file(user))
    return files


def read_file(path: Path, *, is_project: bool = False) -> SettingsFile:
    """What one file sets; the keys of flags are looked at where flags are known.

    Raises:
        UsageError: as `read_settings`.
    """
    raw = _parse(path)
    model = raw.pop("model", None)
    names, models = (_table(path, name, raw.pop(name, {})) for name in _TABLES)
    if model is not None:
        _require_name(path, "model", model, is_project)
    for name, target in names.items():
        _require_name(path, f"aliases.{name}", target, is_project)
    by_model = {name: _table(path, f"models.{name}", value) for name, value in models.items()}
    for key, value in (item for table in (raw, *by_model.values()) for item in table.items()):
        if type(value) not in (str, int, float, bool):
            raise _wrong(path, f"{key} is {_shown(value)}, which no setting is")
    return SettingsFile(path, is_project, model, names, raw, by_model)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, f"{name} is {_shown(value)}, not a table")
    return value


def _require_name(path: Path, what: str, name: Any, is_project: bool) -> None:
    if not isinstance(name, str) or not name:
        raise _wrong(path, f"{what} is {_shown(name)}, not a model's name")
    if is_project and not _NAME.fullmatch(name):
        raise _wrong(
            path, f"{what} is {_shown(name)}, which is no name; a project names models by name alone"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + "…"


def _parse(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
        if len(data) > _LARGEST_BYTES:
            raise _wrong(path, f"it has more than {_LARGEST_BYTES:,} bytes")
        return tomllib.loads(data.decode("utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check who may read it") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _wrong(path, f"it is not TOML: {reason}") from None


def _wrong(path: Path, why: str) -> UsageError:
    return UsageError(f"the settings in {path} cannot be used: {why}", "correct the file in an editor")


def defaults_for(file: SettingsFile, names: Sequence[str]) -> dict[str, Value]:
    """What a file sets for a model that is known by these names, the first of which counts most."""
    values = dict(file.defaults)
    for name in reversed(names):
        values |= file.models.get(name, {})
    return values


def aliases() -> dict[str, Alias]:
    """All aliases by name; where both files have one, the project's counts.

    Raises:
        UsageError: as `read_settings`.
    """
    found: dict[str, Alias] = {}
    for file in reversed(read_settings()):
        found |= {name: Alias(name, model, file) for name, model in file.aliases.items()}
    return found


def edit_user_file(change: Callable[["TOMLDocument"], None]) -> Path:
    """Let `change` edit the user's file, or a new one, and write it; comments and order stay as they are.

    Raises:
        UsageError: the file cannot be used as it is.
        DiskError: it cannot be written.
    """
    import tomlkit

    path = user_path()
    if path.exists():
        read_file(path)  # says what is wrong with it better than the next line would
    document = tomlkit.parse(path.read_text("utf-8-sig")) if path.exists() else tomlkit.document()
    change(document)
    try:
        _write(path, tomlkit.dumps(document))
    except OSError as error:
        raise DiskError(
            f"{path} cannot be written: {error.strerror}", "check who owns it, and whether the disk is full"
        ) from None
    return path


def _write(path: Path, text: str) -> None:
    """Put a file in its place complete or not at all; one that is a link stays one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.resolve(), text)
