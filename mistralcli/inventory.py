"""The models that are stored on this machine: listed, found and removed, the broken ones too."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mistralcli import stamps
from mistralcli.config import MODEL_TYPES, read_config, read_json
from mistralcli.demo import DEMO
from mistralcli.errors import DiskError, MistralError, ModelNotFoundError, UsageError
from mistralcli.hub_cache import (
    PART_SUFFIX,
    cache_directory,
    cached_repo_ids,
    drop_dangling,
    find_snapshot,
    is_being_fetched,
    is_locked,
    refs,
    snapshots,
)
from mistralcli.settings import aliases
from mistralcli.store import (
    PARTIAL,
    as_hub_model,
    checkpoint_problem,
    failed_its_gate,
    models_directory,
    not_found,
    read_or_empty,
)
from quant.files import STEMS, weight_files
from quant.staging import CARD, can_be_resumed

Kind = Literal["build", "hub"]

_LONGEST_HEADER_BYTES = 16 << 20
"""Of a file of weights: a 123B model's have 0.1 MB in all."""


@dataclass(frozen=True)
class Broken:
    """Why a model cannot be run, or should not be, and what to do about it."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine.

    `name` is what `-m` takes. A pulled one has a `revision` (its commit) and the `refs` (branches and tags)
    that are at it; a build has the name and the revision of its source, as far as its card states them. `scheme`
    says what is stored: a build's scheme, else the type of the weights. `used` is when it last ran, if it ever did.
    """

    name: str
    kind: Kind
    source: str | None
    revision: str | None
    refs: tuple[str, ...]
    scheme: str | None
    size_bytes: int
    path: Path
    modified: datetime
    used: datetime | None
    broken: Broken | None


def list_models() -> list[StoredModel]:
    """Every model on this machine, builds first; broken ones too, but not those of kinds we do not run."""
    return [*_builds(), *(model for repo_id in cached_repo_ids() for model in _pulled(repo_id))]


def names() -> list[str]:
    """The names of all that `list_models` lists, found quickly: nothing is measured, and no weights are looked at."""
    ours = (id_ for id_ in cached_repo_ids() if any(map(_is_of_our_kind, snapshots(id_).values())))
    return [*(path.name for path in _build_paths()), *ours]


def find(name: str) -> list[StoredModel]:
    """The stored models that `name` means: one build, or all revisions of a Hub id unless it states one.

    Raises:
        ModelNotFoundError: there are none.
        UsageError: it is the demo in the package, or an alias, which means a model but is none.
    """
    if not name:
        raise not_found(name)
    stored = list_models()
    found = [model for model in stored if model.kind == "build" and model.name == name]
    if not found and (wanted := as_hub_model(name)):
        found = [model for model in stored if model.kind == "hub" and model.name == wanted.repo_id]
        if wanted.revision:
            found = [model for model in found if model.path == find_snapshot(wanted)]
    if not found and (alias := aliases().get(name)):
        raise UsageError(
            f"{name} is an alias of {alias.model}",
            f"name that model, or remove the alias with: mistral alias --remove {name}",
        )
    if not found and name == DEMO:
        raise UsageError("the model demo is built in, so it is not removed alone", "it goes with mistral-cli")
    if not found:
        raise ModelNotFoundError(f"no model is stored here as {name}", "`mistral list` shows those that are")
    return found


def remove(model: StoredModel) -> None:
    """Delete a stored model; what other revisions in the Hub's cache share with it stays.

    Raises:
        UsageError: another process is making it, or fetches it.
        DiskError: it cannot be deleted.
    """
    require_idle(model)
    try:
        if model.kind == "hub":
            _remove_pulled(model)
        elif model.path.is_symlink():
            model.path.unlink()
        else:
            shutil.rmtree(model.path)
    except OSError as error:
        raise DiskError(
            f"{model.path} cannot be removed: {error.strerror}", "check who owns it, and the disk"
        ) from error
    if model.path.exists():
        raise DiskError(f"{model.path} cannot be removed", "check who owns it")
    stamps.drop(model.path)


def require_idle(model: StoredModel) -> None:
    """Raise UsageError where another process is making it or fetches it, and so has it locked."""
    if model.kind == "hub":
        is_busy, what = is_being_fetched(model.name), "pulled"
    else:
        name = model.path.name.removesuffix(PARTIAL).removesuffix(".spool")
        parts = [model.path.with_name(f"{name}{suffix}") for suffix in (PARTIAL, f".spool{PARTIAL}")]
        is_busy, what = model.path in parts and any(map(is_locked, parts)), "made"
    if is_busy:
        raise UsageError(f"{model.name} is being {what} by another process", "wait for it, or stop it")


def is_ours(model: StoredModel) -> bool:
    """Whether nobody else can count on it: a build, or a snapshot that we fetched into the shared cache."""
    return model.kind == "build" or stamps.is_of("pulled", model.path)


def _builds() -> Iterator[StoredModel]:
    for path in _build_paths():
        origin = read_or_empty(path / "quantization_card.json").get("source")
        origin = origin if isinstance(origin, dict) else {}
        yield _stored(
            path.name,
            "build",
            path,
            source=_text(origin.get("name")),
            revision=_text(origin.get("revision")),
            broken=_build_problem(path),
        )


def _build_paths() -> Iterator[Path]:
    for path in sorted(models_directory().glob("*")):
        if not path.name.startswith(".") and (path.is_dir() or path.is_symlink()):
            yield path


def _pulled(repo_id: str) -> Iterator[StoredModel]:
    names = refs(repo_id)
    for commit, path in snapshots(repo_id).items():
        if _is_of_our_kind(path):
            at = tuple(name for name, other in names.items() if other == commit)
            broken = _pulled_problem(f"{repo_id}@{commit[:12]}" if len(names) > 1 else repo_id, path)
            yield _stored(repo_id, "hub", path, source=repo_id, revision=commit, refs=at, broken=broken)


def _is_of_our_kind(snapshot: Path) -> bool:
    """Whether a snapshot is a model of a kind that we run, or was to be one; other tools have theirs there as well."""
    if (snapshot / "params.json").is_file() or stamps.is_of("pulled", snapshot):
        return True
    return read_or_empty(snapshot / "config.json").get("model_type") in MODEL_TYPES


def _stored(
    name: str,
    kind: Kind,
    path: Path,
    *,
    source: str | None,
    revision: str | None,
    broken: Broken | None,
    refs: tuple[str, ...] = (),
) -> StoredModel:
    return StoredModel(
        name=name,
        kind=kind,
        source=source,
        revision=revision,
        refs=refs,
        scheme=stored_scheme(path),
        size_bytes=_size_bytes(path),
        path=path,
        modified=datetime.fromtimestamp(path.lstat().st_mtime, UTC),
        used=stamps.when("used", path),
        broken=broken,
    )


def _size_bytes(directory: Path) -> int:
    """Bytes of the files in it, each counted once; those that go meanwhile count nothing."""
    files = set()
    total = 0
    for file in directory.rglob("*"):
        with suppress(OSError):
            if file.is_file() and (real := file.resolve()) not in files:
                files.add(real)
                total += real.stat().st_size
    return total


def _build_problem(path: Path) -> Broken | None:
    again = f"make it again with `mistral quantize`, or `mistral rm {path.name}`"
    if path.is_symlink() and not path.exists():
        return Broken(f"a link to {path.readlink()}, where nothing is", f"`mistral rm {path.name}`")
    if path.name.endswith(PARTIAL):
        whole = path.with_name(path.name.removesuffix(PARTIAL).removesuffix(".spool"))
        is_pulled = whole.with_name(f"{whole.name}.spool{PARTIAL}").is_dir()
        command = "mistral pull --quantize" if is_pulled else "mistral quantize --resume"
        go_on = f"go on with `{command}`, or `mistral rm {path.name}`"
        return Broken("half-made", go_on if is_pulled or can_be_resumed(whole) else again)
    if failed_its_gate(path):
        return Broken("failed its quality gate", f"make it again with more bits, or `mistral rm {path.name}`")
    problem = _problem(path) or _card_problem(path)
    return None if problem is None else Broken(problem, again)


def _pulled_problem(name: str, path: Path) -> Broken | None:
    problem = _problem(path)
    if problem is None:
        return None
    is_begun = any((path.parent.parent / "blobs").glob(f"*{PART_SUFFIX}"))
    reason, pull = ("half-pulled", "go on with") if is_begun else (problem, "fetch it again with")
    return Broken(reason, f"{pull} `mistral pull {name}`, or `mistral rm {name}`")


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be run, as far as names, the configuration and the weights' headers tell."""
    return checkpoint_problem(path) or _config_problem(path) or _weights_problem(path)


def _config_problem(path: Path) -> str | None:
    """Why a configuration cannot be used. That of Mistral's own layout is read with the weights, when it runs."""
    try:
        if (path / "config.json").is_file():
            read_config(path)
    except MistralError as error:
        return error.message
    return None


def _weights_problem(path: Path) -> str | None:
    """Which file of weights has not the length that its header accounts for: a copy that broke off, for one."""
    for name in next(filter(None, (weight_files(path, stem) for stem in STEMS)), []):
        try:
            size_bytes, stated = (path / name).stat().st_size, _stated_size(path / name)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"{name} is no safetensors file"
        if size_bytes != stated:
            return f"{name} has {size_bytes:,} bytes instead of {stated:,}"
    return None


def _stated_size(path: Path) -> int:
    """The bytes of a safetensors file by its own header. Raises ValueError or the like where it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _LONGEST_HEADER_BYTES)))
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return 8 + length + int(max(ends, default=0))


def _card_problem(path: Path) -> str | None:
    try:
        if (path / CARD).is_file():
            read_json(path / CARD)
    except MistralError:
        return f"its {CARD} cannot be read"
    return None


def stored_scheme(directory: Path) -> str | None:
    """The scheme that a build's card states, else how the configuration says that the weights are stored."""
    scheme = read_or_empty(directory / "quantization_card.json").get("scheme")
    if isinstance(scheme, str):
        return scheme
    config = read_or_empty(directory / "config.json")
    quantization = config.get("quantization_config")
    value = quantization.get("quant_method") if isinstance(quantization, dict) else config.get("dtype")
    return _text(value or config.get("torch_dtype"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _remove_pulled(model: StoredModel) -> None:
    """Let huggingface_hub delete a revision, in view of its repository alone: copies share their commits."""
    from huggingface_hub import scan_cache_dir

    assert model.revision is not None
    drop_dangling(model.name)
    cache = scan_cache_dir(cache_directory())
    own = frozenset(repo for repo in cache.repos if (repo.repo_type, repo.repo_id) == ("model", model.name))
    replace(cache, repos=own).delete_revisions(model.revision).execute()
