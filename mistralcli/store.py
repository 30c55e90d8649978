"""What a model's name means on this machine: which directory, and whether it can be run.

A model is named, in this order, by an existing directory when the name has a path separator or begins with a
dot; by an alias; by a build's name; by a Hub id with an optional `@REVISION`; `demo` is the one in the package.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import platformdirs

from mistralcli import stamps
from mistralcli.config import read_json
from mistralcli.demo import DEMO, demo_directory
from mistralcli.errors import IntegrityError, MistralError, ModelNotFoundError, QualityError, UsageError
from mistralcli.hub_cache import (
    HubModel,
    cache_directory,
    cached_repo_ids,
    find_snapshot,
    parse_hub_model,
)
from mistralcli.settings import Alias, aliases
from quant.files import STEMS, weight_files
from quant.staging import CARD, FORMAT_VERSION

PARTIAL = ".partial"
"""The suffix of a build's directory while it is being made."""

REINSTALL = "reinstall mistral-cli, whose package has the demo model in it (pip install --force-reinstall)"
"""What to do when something is missing from the demo."""

_LONGEST_PART_BYTES = 235
"""Of the 255 that a file's name may have, what a build leaves for the suffixes of its making."""

_BUILD_NAME = re.compile(r"\w[\w.-]{0,126}", re.ASCII)


def models_directory() -> Path:
    """Where builds are kept: `$XDG_DATA_HOME/mistral/models` on Linux."""
    return platformdirs.user_data_path("mistral") / "models"


def sessions_directory() -> Path:
    """Where chats are kept, beside the builds."""
    return platformdirs.user_data_path("mistral") / "sessions"


def build_directory(name: str) -> Path:
    """Where the build `name` is or would be; with a path separator, or a dot at the start, it is a path.

    Raises:
        UsageError: the name could not be told from a path, a revision or a half-made build, or is too long.
    """
    if is_path(name):
        if any(len(os.fsencode(part)) > _LONGEST_PART_BYTES for part in Path(name).parts):
            raise UsageError(
                f"the path {name} has a part longer than {_LONGEST_PART_BYTES} bytes", "shorten it"
            )
        return Path(name)
    if not _BUILD_NAME.fullmatch(name) or ".." in name or name.endswith(PARTIAL):
        raise UsageError(
            f"{name!r} cannot be a build's name",
            "use letters, digits, dots, dashes and underscores; or a path, which has a separator in it",
        )
    return models_directory() / name


def resolve(model: str) -> Path:
    """The directory of the checkpoint that `model` names.

    Raises:
        ModelNotFoundError: there is none; the hint says how to get it.
        IntegrityError: it is there but half-made or incomplete.
        MistralError: it is a build in a format that is newer than this program.
        UsageError: an alias leads back to itself, or the settings cannot be used.
    """
    model = unaliased(model)
    path = _existing_path(model)
    directory = path if path is not None and path.is_dir() else _find_by_name(model)
    if directory is not None and directory.name.endswith(PARTIAL):
        raise IntegrityError(f"{model} is a half-made build", "make it again with `mistral quantize`")
    if directory == demo_directory():
        return resolve_demo()
    link = models_directory() / model
    if directory is None and _BUILD_NAME.fullmatch(model) and link.is_symlink():
        raise IntegrityError(
            f"the build {model} is a link to {link.readlink()}, where nothing is", f"mistral rm {model}"
        )
    if directory is None or (directory == path and not has_config(directory)):
        raise not_found(model)
    problem = checkpoint_problem(directory)
    if problem is not None:
        raise IntegrityError(f"{model} is incomplete: {problem} ({directory})", "pull or quantize it again")
    _require_known_format(model, directory)
    return directory


def unaliased(model: str) -> str:
    """The model that an alias stands for; any other name stands for itself.

    Raises:
        UsageError: an alias leads back to itself, or the settings cannot be used.
    """
    return known_as(model)[-1]


def known_as(model: str) -> list[str]:
    """`model`, and what it stands for where it is an alias, of which the last is none.

    Raises:
        UsageError: as `unaliased`.
    """
    chain = [model]
    if is_path(model) and _existing_path(model) is not None:
        return chain
    known = aliases()
    while (alias := known.get(chain[-1])) is not None and not gives_way(alias):
        chain.append(alias.model)
        if alias.model in chain[:-1]:
            raise UsageError(
                f"the alias {model} leads back to itself: {' → '.join(chain)}",
                f"remove one of them from {alias.file.path}",
            )
    return chain


def alias_target(name: str, model: str) -> str:
    """What an alias `name` would have to mean so that it means `model`: a path becomes an absolute one.

    Raises:
        UsageError: the name could not be told from a path, a revision or a build, or is that of a model; or `model`
            is the name of none, or leads back to the alias.
    """
    if not _BUILD_NAME.fullmatch(name) or ".." in name or name.endswith(PARTIAL):
        raise UsageError(f"{name!r} cannot be an alias", "use letters, digits, dots, dashes and underscores")
    if is_taken(name):
        raise UsageError(f"{name} is the name of a model that is here", "choose another name for the alias")
    # Path.expanduser raises where nobody has that name, and resolve() would follow links.
    path = os.path.abspath(os.path.expanduser(model))  # noqa: PTH100, PTH111
    if is_path(model) and (Path(path).is_dir() or as_hub_model(model) is None):
        return path
    if as_hub_model(model) is None:
        raise UsageError(f"{model!r} is no model's name", "name a Hub id, a build, an alias or a directory")
    if name in known_as(model):
        raise UsageError(f"the alias {name} would lead back to itself", "name the model that it is to mean")
    return model


def gives_way(alias: Alias) -> bool:
    """Whether a model has the name of an alias that a project's file gives: there, the model is meant."""
    return alias.file.is_project and is_taken(alias.name)


def is_taken(name: str) -> bool:
    """Whether a build or a pulled model has that name, or the demo."""
    return name == DEMO or _find_by_name(name) is not None


def note_use(directory: Path) -> None:
    """Record that a model is used now, if it is one of those that `mistral list` shows."""
    if directory.absolute().is_relative_to(models_directory()) or directory.is_relative_to(cache_directory()):
        stamps.leave("used", directory)


def resolve_demo() -> Path:
    """The directory of the demo in the package, also when another model has its name.

    Raises:
        IntegrityError: it is incomplete.
    """
    directory = demo_directory()
    problem = checkpoint_problem(directory)
    if problem is not None:
        raise IntegrityError(f"the installation is incomplete: {problem} ({directory})", REINSTALL)
    return directory


def resolve_to_run(model: str) -> Path:
    """As `resolve`, for a model that is to answer.

    Raises:
        QualityError: it is a build that failed its quality gate.
    """
    directory = resolve(model)
    if failed_its_gate(directory):
        raise QualityError(
            f"the build {model} failed its quality gate, so it is not run",
            "make it again with more bits, or with a higher --max-error and --force",
        )
    return directory


def checkpoint_problem(directory: Path) -> str | None:
    """Why the checkpoint in `directory` cannot be whole, or None. Looks at names, not into the weights."""
    if not has_config(directory):
        return "it has neither config.json nor params.json"
    try:
        files = next(filter(None, (weight_files(directory, stem) for stem in STEMS)), [])
    except MistralError as error:
        return error.message
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        return f"{len(missing)} of {len(files)} weight files are missing, first {missing[0]}"
    return None if files else "its weights are missing"


def is_path(name: str) -> bool:
    """Whether a name is written as a path: it has a separator, or begins with a dot."""
    return name.startswith(".") or any(separator in name for separator in (os.sep, os.altsep) if separator)


def _existing_path(name: str) -> Path | None:
    """The path that `name` is, when something is there."""
    try:
        return Path(name) if is_path(name) and Path(name).exists() else None
    except OSError:  # for one, no file can have so long a name
        return None


def as_hub_model(name: str) -> HubModel | None:
    try:
        return parse_hub_model(name)
    except UsageError:
        return None


def _find_by_name(model: str) -> Path | None:
    if _BUILD_NAME.fullmatch(model) and (directory := models_directory() / model).is_dir():
        return directory
    wanted = as_hub_model(model)
    snapshot = find_snapshot(wanted) if wanted else None
    return demo_directory() if snapshot is None and model == DEMO else snapshot


def not_found(model: str) -> ModelNotFoundError:
    if not model:
        return ModelNotFoundError(
            "the model's name is empty", "`mistral list` shows the models that are here"
        )
    if _existing_path(model) is not None:
        return ModelNotFoundError(
            f"{model} is not a model: it has neither config.json nor params.json",
            "name a directory with a checkpoint, or a model that `mistral list` shows",
        )
    builds = {path.name for path in models_directory().glob("*") if path.is_dir() and path.suffix != PARTIAL}
    known = (builds | {*cached_repo_ids(), *aliases()}) - {model}
    near = difflib.get_close_matches(model, sorted(known), n=1)
    hint = f"did you mean {near[0]}? else " if near else ""
    wanted = as_hub_model(model)
    if wanted and "/" in wanted.repo_id:
        hint += f"get it with: mistral pull {wanted}"
    else:
        hint += "`mistral list` shows the models that are here, `mistral pull OWNER/NAME` gets others"
    return ModelNotFoundError(f"the model {model} is not on this machine", hint)


def has_config(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", "params.json"))


def _require_known_format(model: str, directory: Path) -> None:
    version = read_or_empty(directory / CARD).get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise MistralError(
            f"the build {model} is in format version {version!r}, and this program reads 1 to {FORMAT_VERSION}",
            "it was made by a newer mistral-cli: update this one, or make the build again",
        )


def failed_its_gate(directory: Path) -> bool:
    """Whether a build's card says so."""
    gate = read_or_empty(directory / "quantization_card.json").get("gate")
    return isinstance(gate, dict) and gate.get("passed") is False


def read_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object that may be missing or damaged, which other checks report."""
    try:
        return read_json(path)
    except MistralError:
        return {}
