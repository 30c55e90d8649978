"""What this program keeps on disk, and how much that takes: models, leftovers, chats, compiled kernels."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from mistralcli.errors import DiskError
from mistralcli.hub_cache import PART_SUFFIX, cache_directory, is_locked, repo_directory
from mistralcli.inventory import StoredModel, is_ours, list_models
from mistralcli.store import sessions_directory
from quant.kernels.cpu.object_code import places

Kind = Literal["build", "pulled", "leftovers", "chats", "kernels"]

_PARTS = f"blobs/*{PART_SUFFIX}*"


@dataclass(frozen=True)
class Usage:
    """One row: files and directories that belong together. `ours` is False where other tools may count on them."""

    kind: Kind
    name: str
    paths: tuple[Path, ...]
    size_bytes: int
    ours: bool = True


def disk_usage() -> list[Usage]:
    """All that is there, models first. What several revisions of a pulled model share counts once."""
    models = list_models()
    builds = [
        Usage("build", model.name, (model.path,), 0 if model.path.is_symlink() else model.size_bytes)
        for model in models
        if model.kind == "build"
    ]
    rest = (_leftovers(), _chats(), _kernels(), _triton())
    return [*builds, *_pulled(models), *(usage for usage in rest if usage.paths)]


def size_bytes(paths: Iterable[Path]) -> int:
    """What files, and those in directories, take together; a file that several names lead to counts once.

    Of a file with holes, as one is that is still coming, only what is in it counts.
    """
    files = {}
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if file.is_file():
                    status = file.stat()
                    files[status.st_dev, status.st_ino] = min(status.st_size, status.st_blocks * 512)
    return sum(files.values())


def freed_bytes(models: Iterable[StoredModel]) -> int:
    """What the disk gets back when these go: not what other revisions of a pulled model share with them.

    With the last revision goes what came of files that are not finished.
    """
    models, stored = list(models), list_models()
    going = {model.path for model in models if not model.path.is_symlink()}
    kept = {model.path for model in stored if not model.path.is_symlink()} - going
    staying = {model.name for model in stored if model.path in kept}
    ended = {model.name for model in models if model.kind == "hub"} - staying
    parts = {part for name in ended for part in repo_directory(name).glob(_PARTS)}
    return size_bytes(going | kept | parts) - size_bytes(kept)


def remove(usage: Usage) -> None:
    """Delete leftovers or kernels. Raises DiskError where that fails."""
    for path in usage.paths:
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DiskError(
                f"{error.filename or path} cannot be removed: {error.strerror}", "check who owns it"
            ) from error


def _pulled(models: Iterable[StoredModel]) -> Iterator[Usage]:
    """A row for each repository, which is ours when each of its revisions is."""
    by_repository: dict[str, list[StoredModel]] = {}
    for model in models:
        if model.kind == "hub":
            by_repository.setdefault(model.name, []).append(model)
    for name, revisions in by_repository.items():
        directory = repo_directory(name)
        n_bytes = size_bytes([directory]) - size_bytes(directory.glob(_PARTS))
        yield Usage("pulled", name, (directory,), n_bytes, all(map(is_ours, revisions)))


def _leftovers() -> Usage:
    """What downloads that were stopped left in the Hub's cache; half-made builds are listed as such."""
    parts = cache_directory().glob(f"models--*/{_PARTS}")
    paths = tuple(sorted(part for part in parts if not _is_coming(part)))
    return Usage("leftovers", "files of interrupted commands", paths, size_bytes(paths))


def _is_coming(part: Path) -> bool:
    """Whether another process fetches that file now, and so has it locked."""
    name = part.name.partition(".")[0]
    return is_locked(cache_directory() / ".locks" / part.parent.parent.name / f"{name}.lock")


def _chats() -> Usage:
    """Sessions and the history of what was typed."""
    state = platformdirs.user_state_path("mistral")
    sessions = sessions_directory()
    typed = sorted(path for path in state.glob("*") if path.name not in ("used", "pulled"))
    paths = (*typed, *([sessions] if sessions.is_dir() else []))
    return Usage("chats", "sessions and history", paths, size_bytes(paths))


def _kernels() -> Usage:
    """What was compiled for this processor, beside the package or in the user's cache."""
    packages = Path(__file__).resolve().parent.parent
    folders = (packages / "quant" / "kernels" / "cpu", packages / "mistralcli" / "kernels" / "cpu")
    found = {place for folder in folders for place in places(folder)}
    paths = tuple(sorted(place for place in found if os.path.isdir(place)))  # noqa: PTH112 (never raises)
    return Usage("kernels", "compiled for this CPU", paths, size_bytes(paths))


def _triton() -> Usage:
    """Kernels for GPUs are in a cache that all programs with Triton share."""
    path = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    paths = (path,) if path.is_dir() else ()
    return Usage("kernels", "compiled by Triton", paths, size_bytes(paths), ours=False)
