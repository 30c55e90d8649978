"""The Hub's cache on this machine, which all Hugging Face tools share, in its published layout:

    models--OWNER--NAME/refs/REVISION       a file that holds the commit which a branch or tag was at
    models--OWNER--NAME/snapshots/COMMIT/   that commit's files, as links into blobs/
    models--OWNER--NAME/blobs/DIGEST        their content, shared by all snapshots
    .locks/models--OWNER--NAME/DIGEST.lock  held by whoever is fetching that content

Ours alone are blobs/DIGEST.mistral-part and its journal, of a download that is not finished.

Nothing here imports huggingface_hub: `mistral run` finds its model without waiting for it.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistralcli.errors import UsageError
from mistralcli.file_lock import try_lock

PART_SUFFIX = ".mistral-part"
"""Of a file that is being downloaded, beside the blobs; huggingface_hub's own end in `.incomplete`."""
JOURNAL_SUFFIX = ".journal"
"""Of what says which bytes of it are here."""

_WORD = r"\w(?:[\w.-]{0,94}\w)?"
_REPO_ID = re.compile(rf"(?:{_WORD}/)?{_WORD}", re.ASCII)
_REVISION = re.compile(r"\w(?:[\w./+-]{0,250}[\w+-])?", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Of git for small files, SHA-256 for large ones."""
_COMMIT_PREFIX = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub: OWNER/NAME, and a branch, tag or commit, or None for the default."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def parse_hub_model(text: str) -> HubModel:
    """`OWNER/NAME` or `OWNER/NAME@REVISION`; both parts become paths, so their characters are few.

    Raises:
        UsageError: `text` is neither.
    """
    repo_id, has_revision, revision = text.partition("@")
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise UsageError(
            f"{repo_id!r} is not a model's name on the Hub", "write OWNER/NAME or OWNER/NAME@REVISION"
        )
    if not has_revision:
        return HubModel(repo_id)
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise UsageError(f"{revision!r} is not a revision", "write a branch, a tag or a commit after the @")
    return HubModel(repo_id, revision)


def cache_directory() -> Path:
    """Where the cache is, by the variables that huggingface_hub reads."""
    get = os.environ.get
    home = get("HF_HOME") or f"{get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    # As huggingface_hub does it: Path.expanduser raises where nobody has that name.
    return Path(os.path.expanduser(os.path.expandvars(cache))).absolute()  # noqa: PTH111


def repo_directory(repo_id: str) -> Path:
    """Where the cache keeps a repository, whether or not it is there."""
    return cache_directory() / f"models--{repo_id.replace('/', '--')}"


def cached_repo_ids() -> list[str]:
    """The model repositories in the cache, sorted."""
    found = (path.name.split("--")[1:] for path in cache_directory().glob("models--*") if path.is_dir())
    return sorted("/".join(parts) for parts in found)


def snapshots(repo_id: str) -> dict[str, Path]:
    """The commits of a repository that the cache has, with the directory of each."""
    directory = repo_directory(repo_id) / "snapshots"
    return {path.name: path for path in sorted(directory.glob("*")) if path.is_dir()}


def refs(repo_id: str) -> dict[str, str]:
    """The branches and tags of a repository that the cache knows, with the commit that each was at."""
    directory = repo_directory(repo_id) / "refs"
    found = {}
    for path in sorted(directory.rglob("*")):
        with suppress(OSError):  # another user's, or gone meanwhile
            if path.is_file():
                found[path.relative_to(directory).as_posix()] = path.read_text(errors="replace").strip()
    return found


def find_snapshot(model: HubModel) -> Path | None:
    """The directory of a model at its revision, or None when the cache does not have it.

    Without a revision it is the branch `main`, or the only commit there is. A commit may be shortened to
    seven digits or more, when that is unambiguous.
    """
    commits, revision = snapshots(model.repo_id), model.revision or "main"
    named = refs(model.repo_id).get(revision)
    if named is not None:
        return commits.get(named)
    if model.revision is None:
        return next(iter(commits.values())) if len(commits) == 1 else None
    matching = [path for commit, path in commits.items() if commit.startswith(revision)]
    return matching[0] if _COMMIT_PREFIX.fullmatch(revision) and len(matching) == 1 else None


def write_ref(model: HubModel, commit: str) -> None:
    """Record which commit the model's branch or tag is at, unless that is known; a commit needs no record."""
    revision = model.revision or "main"
    if revision == commit or refs(model.repo_id).get(revision) == commit:
        return
    path = repo_directory(model.repo_id) / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = repo_directory(model.repo_id) / f"refs.{os.getpid()}.tmp"  # what lies in refs is one
    temporary.write_text(commit)
    temporary.replace(path)


def blob_digest(path: Path) -> str | None:
    """The digest that a snapshot's file has by the name of the blob that it links to; None for any other file."""
    if not path.is_symlink():
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" and _DIGEST.fullmatch(target.name) else None


def blob_path(repo_id: str, digest: str) -> Path:
    """Where the cache keeps a file's content, whether or not it is there."""
    return repo_directory(repo_id) / "blobs" / digest


def lock_path(repo_id: str, digest: str) -> Path:
    """The file that huggingface_hub and we lock while that content is fetched."""
    return cache_directory() / ".locks" / repo_directory(repo_id).name / f"{digest}.lock"


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on a file or directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def is_being_fetched(repo_id: str) -> bool:
    """Whether another process fetches a file of that repository now."""
    return any(map(is_locked, lock_path(repo_id, "").parent.glob("*.lock")))


def enter_snapshot(blob: Path, path: Path, *, is_new: bool, use_links: bool = True) -> None:
    """Let `path` in a snapshot be the file whose content is `blob`: a relative link.

    Where links cannot be made it is the blob itself, moved there, or a copy of one that was here before, which others
    may use.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if use_links:
        with suppress(OSError, NotImplementedError):
            path.symlink_to(os.path.relpath(blob, path.parent))
            return
    if not is_new:
        copy = blob.with_name(blob.name + PART_SUFFIX)  # half of it must not have the file's name
        shutil.copyfile(blob, copy)
        blob = copy
    blob.replace(path)


def drop_dangling(repo_id: str) -> None:
    """Remove links without a blob and refs without a snapshot, which huggingface_hub takes for corruption."""
    for path in _dangling(repo_id):
        path.unlink()


def _dangling(repo_id: str) -> Iterator[Path]:
    directory, commits = repo_directory(repo_id), snapshots(repo_id)
    links = (path for path in (directory / "snapshots").rglob("*") if path.is_symlink())
    yield from (link for link in links if not link.exists())
    yield from (directory / "refs" / name for name, commit in refs(repo_id).items() if commit not in commits)
