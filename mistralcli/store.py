"""The models on this machine: our builds by name, and what was pulled into the Hub's cache by its Hub id.

A model is named, in this order, by an existing directory when the name has a path separator or begins with a
dot; by a build's name; by a Hub id with an optional `@REVISION`; `demo` is the one in the package.
"""

import difflib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import platformdirs

from mistralcli.config import MODEL_TYPES, read_json
from mistralcli.demo import DEMO, demo_directory
from mistralcli.errors import (
    DiskError,
    IntegrityError,
    MistralError,
    ModelNotFoundError,
    QualityError,
    UsageError,
)
from mistralcli.hub_cache import (
    HubModel,
    cache_directory,
    cached_repo_ids,
    drop_dangling,
    find_snapshot,
    parse_hub_model,
    refs,
    snapshots,
)
from quant.files import STEMS, weight_files

PARTIAL = ".partial"
"""The suffix of a build's directory while it is being made."""

REINSTALL = "reinstall mistral-cli, whose package has the demo model in it (pip install --force-reinstall)"
"""What to do when something is missing from the demo."""

_LONGEST_PART_BYTES = 235
"""Of the 255 that a file's name may have, what a build leaves for the suffixes of its making."""

_BUILD_NAME = re.compile(r"\w[\w.-]{0,126}", re.ASCII)


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine.

    `name` is what `-m` takes. A pulled one has a `revision` (its commit) and the `refs` (branches and tags)
    that are at it. `scheme` says what is stored: a build's scheme, else the type of the weights. `broken`
    says why it cannot be run, or should not be; else it is None.
    """

    name: str
    kind: Literal["build", "hub"]
    revision: str | None
    refs: tuple[str, ...]
    scheme: str | None
    size_bytes: int
    path: Path
    modified: datetime
    broken: str | None


def models_directory() -> Path:
    """Where builds are kept: `$XDG_DATA_HOME/mistral/models` on Linux."""
    return platformdirs.user_data_path("mistral") / "models"


def build_directory(name: str) -> Path:
    """Where the build `name` is or would be; with a path separator, or a dot at the start, it is a path.

    Raises:
        UsageError: the name could not be told from a path, a revision or a half-made build, or is too long.
    """
    if _is_path(name):
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
    """
    path = _existing_path(model)
    directory = path if path is not None and path.is_dir() else _find_by_name(model)
    if directory is not None and directory.name.endswith(PARTIAL):
        raise IntegrityError(f"{model} is a half-made build", "make it again with `mistral quantize`")
    if directory == demo_directory():
        return resolve_demo()
    if directory is None or not _has_config(directory):
        raise _not_found(model)
    problem = checkpoint_problem(directory)
    if problem is not None:
        raise IntegrityError(f"{model} is incomplete: {problem} ({directory})", "pull or quantize it again")
    return directory


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
    if _failed_its_gate(directory):
        raise QualityError(
            f"the build {model} failed its quality gate, so it is not run",
            "make it again with more bits, or with a higher --max-error and --force",
        )
    return directory


def checkpoint_problem(directory: Path) -> str | None:
    """Why the checkpoint in `directory` cannot be whole, or None. Looks at names, not into the weights."""
    if not _has_config(directory):
        return "it has neither config.json nor params.json"
    try:
        files = next(filter(None, (weight_files(directory, stem) for stem in STEMS)), [])
    except MistralError as error:
        return error.message
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        return f"{len(missing)} of {len(files)} weight files are missing, first {missing[0]}"
    return None if files else "its weights are missing"


def list_models() -> list[StoredModel]:
    """Every model on this machine, builds first; broken ones too, but not those of kinds we do not run."""
    return [*_builds(), *(model for repo_id in cached_repo_ids() for model in _pulled(repo_id))]


def find(name: str) -> list[StoredModel]:
    """The stored models that `name` means: one build, or all revisions of a Hub id unless it states one.

    Raises:
        ModelNotFoundError: there are none.
        UsageError: it is the demo in the package.
    """
    if not name:
        raise _not_found(name)
    stored = list_models()
    found = [model for model in stored if model.kind == "build" and model.name == name]
    if not found and (wanted := _as_hub_model(name)):
        found = [model for model in stored if model.kind == "hub" and model.name == wanted.repo_id]
        if wanted.revision:
            found = [model for model in found if model.path == find_snapshot(wanted)]
    if not found and name == DEMO:
        raise UsageError("the model demo is built in: it is a part of mistral-cli, and goes with it")
    if not found:
        raise ModelNotFoundError(f"no model is stored here as {name}", "`mistral list` shows those that are")
    return found


def remove(model: StoredModel) -> None:
    """Delete a stored model; what other revisions in the Hub's cache share with it stays.

    Raises:
        DiskError: it cannot be deleted.
    """
    try:
        if model.kind == "hub":
            _remove_pulled(model)
        elif model.path.is_symlink():
            model.path.unlink()
        else:
            shutil.rmtree(model.path)
    except OSError as error:
        raise DiskError(f"{error.filename or model.path} cannot be removed: {error.strerror}") from error
    if model.path.exists():
        raise DiskError(f"{model.path} cannot be removed", "check who owns it")


def _is_path(name: str) -> bool:
    return name.startswith(".") or any(separator in name for separator in (os.sep, os.altsep) if separator)


def _existing_path(name: str) -> Path | None:
    """The path that `name` is, when something is there."""
    try:
        return Path(name) if _is_path(name) and Path(name).exists() else None
    except OSError:  # for one, no file can have so long a name
        return None


def _as_hub_model(name: str) -> HubModel | None:
    try:
        return parse_hub_model(name)
    except UsageError:
        return None


def _find_by_name(model: str) -> Path | None:
    if _BUILD_NAME.fullmatch(model) and (directory := models_directory() / model).is_dir():
        return directory
    wanted = _as_hub_model(model)
    snapshot = find_snapshot(wanted) if wanted else None
    return demo_directory() if snapshot is None and model == DEMO else snapshot


def _not_found(model: str) -> ModelNotFoundError:
    if not model:
        return ModelNotFoundError(
            "the model's name is empty", "`mistral list` shows the models that are here"
        )
    if _existing_path(model) is not None:
        return ModelNotFoundError(
            f"{model} is not a model: it has neither config.json nor params.json",
            "name a directory with a checkpoint, or a model that `mistral list` shows",
        )
    near = difflib.get_close_matches(model, sorted({stored.name for stored in list_models()}), n=1)
    hint = f"did you mean {near[0]}? else " if near else ""
    wanted = _as_hub_model(model)
    if wanted and "/" in wanted.repo_id:
        hint += f"get it with: mistral pull {wanted}"
    else:
        hint += "`mistral list` shows the models that are here, `mistral pull OWNER/NAME` gets others"
    return ModelNotFoundError(f"the model {model} is not on this machine", hint)


def _has_config(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", "params.json"))


def _builds() -> Iterator[StoredModel]:
    for path in sorted(models_directory().glob("*")):
        if path.is_dir() and not path.name.startswith("."):
            yield _stored(path.name, "build", path, broken=_build_problem(path))


def _pulled(repo_id: str) -> Iterator[StoredModel]:
    names = refs(repo_id)
    for commit, path in snapshots(repo_id).items():
        if _is_ours(path):
            at = tuple(name for name, other in names.items() if other == commit)
            yield _stored(repo_id, "hub", path, broken=checkpoint_problem(path), revision=commit, refs=at)


def _is_ours(snapshot: Path) -> bool:
    """Whether a snapshot is a model of a kind that we run; the cache has those of other tools as well."""
    if (snapshot / "params.json").is_file():
        return True
    return _read(snapshot / "config.json").get("model_type") in MODEL_TYPES


def _stored(
    name: str,
    kind: Literal["build", "hub"],
    path: Path,
    *,
    broken: str | None,
    revision: str | None = None,
    refs: tuple[str, ...] = (),
) -> StoredModel:
    files = {file.resolve() for file in path.rglob("*") if file.is_file()}
    return StoredModel(
        name=name,
        kind=kind,
        revision=revision,
        refs=refs,
        scheme=_scheme(path),
        size_bytes=sum(file.stat().st_size for file in files),
        path=path,
        modified=datetime.fromtimestamp(path.stat().st_mtime, UTC),
        broken=broken,
    )


def _build_problem(directory: Path) -> str | None:
    if directory.name.endswith(PARTIAL):
        return "half-made"
    return "failed its quality gate" if _failed_its_gate(directory) else checkpoint_problem(directory)


def _failed_its_gate(directory: Path) -> bool:
    gate = _read(directory / "quantization_card.json").get("gate")
    return isinstance(gate, dict) and gate.get("passed") is False


def _scheme(directory: Path) -> str | None:
    """The scheme that a build's card states, else how the configuration says that the weights are stored."""
    scheme = _read(directory / "quantization_card.json").get("scheme")
    if isinstance(scheme, str):
        return scheme
    config = _read(directory / "config.json")
    quantization = config.get("quantization_config")
    value = quantization.get("quant_method") if isinstance(quantization, dict) else config.get("dtype")
    value = value or config.get("torch_dtype")
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that may be missing or damaged, which other checks report."""
    try:
        return read_json(path)
    except MistralError:
        return {}


def _remove_pulled(model: StoredModel) -> None:
    """Let huggingface_hub delete a revision, in view of its repository alone: copies share their commits."""
    from huggingface_hub import scan_cache_dir

    assert model.revision is not None
    drop_dangling(model.name)
    cache = scan_cache_dir(cache_directory())
    own = frozenset(repo for repo in cache.repos if (repo.repo_type, repo.repo_id) == ("model", model.name))
    replace(cache, repos=own).delete_revisions(model.revision).execute()
