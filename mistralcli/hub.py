"""Pull a model from the Hugging Face Hub into the cache that all its tools share.

huggingface_hub asks for the listing, and keeps the token; files come by `transfer`, which goes on where it was stopped
and checks them against the sizes and hashes that the Hub lists.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout
from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # as in `hub_http`

from mistralcli import __version__, stamps
from mistralcli.config import read_config
from mistralcli.errors import AccessError, DiskError, IntegrityError, NetworkError
from mistralcli.hub_cache import (
    HubModel,
    blob_path,
    cache_directory,
    drop_dangling,
    enter_snapshot,
    find_snapshot,
    lock_path,
    parse_hub_model,
    repo_directory,
    write_ref,
)
from mistralcli.hub_errors import HubRequest, hub_endpoint, not_the_hub, our_errors
from mistralcli.hub_files import RemoteFile, choose_files
from mistralcli.hub_http import DEFAULT_PATIENCE, LIBRARY, Patience, Remote, patiently
from mistralcli.store import checkpoint_problem
from mistralcli.transfer import OnBytes, OnNote, fetch, part_bytes
from mistralcli.units import size_text
from quant.staging import free_bytes

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are here, and with the bytes of all files."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_LOCK_TRY_S = 0.3
"""So long a lock is waited for in silence."""


@dataclass(frozen=True)
class Source:
    """One commit of one repository, and what it takes to ask for its files; `token` is False for none.

    `licence` and `gated` (`auto` or `manual`: who grants access) are as the Hub states them: foreign text.
    """

    request: HubRequest
    token: str | Literal[False]
    commit: str
    licence: str | None = None
    gated: str | None = None

    @property
    def repo_id(self) -> str:
        return self.request.model.repo_id

    @property
    def snapshot(self) -> Path:
        return repo_directory(self.repo_id) / "snapshots" / self.commit


def pull(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    patience: Patience = DEFAULT_PATIENCE,
    on_progress: OnProgress | None = None,
    on_note: OnNote = lambda _: None,
) -> Path:
    """Download one runnable copy of `model` (`OWNER/NAME`, or with `@REVISION`) and return its directory.

    Files that are here already are checked, and fetched again only when they are damaged; those that are here in part
    are gone on with. The branch or tag is recorded last, so that it never names an unfinished download. HF_ENDPOINT,
    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured; offline, a model that is here whole is returned as it is.
    `on_note` gets a line where something is waited for.

    Raises:
        UsageError: `model` is not a model's name.
        ModelNotFoundError: the Hub has no such model or revision, or no weights in it that we read.
        AccessError: the model is gated or private, or the token is refused.
        NetworkError: the Hub cannot be reached, or what answers is not the Hub.
        DiskError: there is too little space, or the cache cannot be written.
        IntegrityError: a file is not what the Hub says it is; it has been removed.
        MistralError: the model is of a kind that this program does not run.
    """
    wanted = parse_hub_model(model if revision is None else f"{model}@{revision}")
    if is_offline_mode():
        return _already_here(wanted)
    source, listing = look_up(wanted, token, patience, on_note)
    while True:
        try:
            return _pull_commit(Fetching(source, patience, on_note), listing, on_progress)
        except IntegrityError:
            latest = look_up(wanted, token, patience, on_note)
            if latest == (source, listing):
                raise
            source, listing = latest
            on_note(f"{wanted} has changed on {source.request.host}: starting over with {source.commit[:12]}")


def _pull_commit(fetching: "Fetching", listing: list[RemoteFile], on_progress: OnProgress | None) -> Path:
    """Have one commit's files in its snapshot, and the branch or tag that names it."""
    source, wanted = fetching.source, fetching.source.request.model
    files = choose_files(wanted.repo_id, listing)
    progress = _Progress(on_progress, files)
    _refuse_unsupported(fetching, files[0])
    _require_space(source, files)
    if not source.snapshot.exists():  # else another tool may count on it
        with our_errors(source.request):
            source.snapshot.mkdir(parents=True)
        stamps.leave("pulled", source.snapshot)
    for file in files:
        _obtain(fetching, file, progress)
        progress.finish(file)
    problem = checkpoint_problem(source.snapshot)
    if problem is not None:
        raise IntegrityError(
            f"{wanted} is incomplete on the Hub: {problem}", f"tell its owner at {source.request.page}"
        )
    with our_errors(source.request):
        write_ref(wanted, source.commit)
    return source.snapshot


def _already_here(model: HubModel) -> Path:
    snapshot = find_snapshot(model)
    if snapshot is None or checkpoint_problem(snapshot) is not None:
        raise is_offline(f"{model} is not on this machine")
    return snapshot


def is_offline(what: str) -> NetworkError:
    """What to say where the Hub must not be asked; `what` the matter is."""
    return NetworkError(
        f"{what}, and --offline or HF_HUB_OFFLINE forbids asking the Hub",
        "leave out --offline, unset HF_HUB_OFFLINE, and pull again",
    )


def look_up(
    model: HubModel,
    token: str | None = None,
    patience: Patience = DEFAULT_PATIENCE,
    on_note: OnNote = lambda _: None,
) -> tuple[Source, list[RemoteFile]]:
    """Which commit a model is at on the Hub, and every file in it; nothing is downloaded.

    Raises:
        MistralError: as `pull`.
    """
    _require_cache()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it would warn of, our errors say
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it also sends which agent runs it and torch's version
    token_and_source = find_token(token)
    return patiently(lambda: _list_files(model, *token_and_source, patience.timeout_s), patience, on_note)


def _require_cache() -> None:
    """Raise DiskError where the cache would lie under a file: even the token is looked for there."""
    cache = cache_directory()
    nearest = next(path for path in (cache, *cache.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise DiskError(
            f"{cache} cannot be made: {nearest} is no directory", "name another directory in HF_HOME"
        )


def find_token(flag: str | None) -> tuple[str | Literal[False], str | None]:
    """The token to send, or False, and where it came from: flag, environment, or the file of `hf auth login`.

    A token with characters that no token has is refused here: the HTTP library's own refusal would show it.
    """
    token, source = flag, "--token"
    if not flag and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        variables = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
        source = variables[0] if variables else f"the file {constants.HF_TOKEN_PATH}"
        try:
            token = get_token()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise AccessError(
                f"the token cannot be read from {source}: {reason}", "give one in HF_TOKEN"
            ) from error
    if not token:
        return False, None
    if not _TOKEN.fullmatch(token):
        raise AccessError(f"the token from {source} has characters that no token has", "copy it again")
    return token, source


def _list_files(
    model: HubModel, token: str | Literal[False], token_source: str | None, timeout_s: float
) -> tuple[Source, list[RemoteFile]]:
    """Ask the Hub which commit `model` is at, and for the name, size and hash of every file in it."""
    request = HubRequest(model, hub_endpoint(), token_source)
    with our_errors(request):
        api = HfApi(request.endpoint, token, library_name=LIBRARY, library_version=__version__)
        try:
            info = api.model_info(
                model.repo_id,
                revision=model.revision,
                files_metadata=True,
                timeout=timeout_s,
            )
            files = [_remote_file(sibling) for sibling in info.siblings or ()]
            gated = info.gated if isinstance(info.gated, str) else None
            return Source(request, token, _commit(info.sha), _licence(info), gated), files
        except ImportError as error:  # which is how httpx refuses one
            raise NetworkError(
                "the proxy settings name a SOCKS proxy, which needs the package socksio",
                "pip install socksio, or unset ALL_PROXY",
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, OSError):  # requests' errors are both
                raise
            raise not_the_hub(error, request) from error


def _licence(info: Any) -> str | None:
    """The licence that the model's card states: its own name where it is none of the usual, and where to read it."""
    card = info.card_data
    stated = [card.get(key) for key in ("license_name", "license", "license_link")] if card else []
    named = [text for text in stated[:2] if isinstance(text, str) and text != "other"][:1]
    named += [text for text in stated[2:] if isinstance(text, str)]
    tags = (tag for tag in info.tags or () if isinstance(tag, str) and tag.startswith("license:"))
    return ", ".join(named) or next((tag.removeprefix("license:") for tag in tags), None)


def _commit(sha: str | None) -> str:
    if sha is None or not _COMMIT.fullmatch(sha):
        raise TypeError("no commit")
    return sha


def _remote_file(sibling: Any) -> RemoteFile:
    """A file of the Hub's answer. Its hash names a file of the cache, so it must be one."""
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    size_bytes = sibling.lfs.size if sibling.lfs else sibling.size
    if not _DIGEST.fullmatch(digest) or not isinstance(size_bytes, int) or size_bytes < 0:
        raise TypeError("no file")
    return RemoteFile(sibling.rfilename, size_bytes, digest)


@dataclass(frozen=True)
class Fetching:
    """What it takes to have files of one commit: whom to ask, for how long, and whom to tell."""

    source: Source
    patience: Patience
    on_note: OnNote

    def remote(self, file: RemoteFile) -> Remote:
        source = self.source
        return Remote(source.request, source.token, source.commit, file, self.patience.timeout_s)

    def fetch(self, file: RemoteFile, target: Path, on_bytes: Callable[[int], None]) -> None:
        """Download a file that is not there, or go on with it."""
        fetch(self.remote(file), target, patience=self.patience, on_bytes=on_bytes, on_note=self.on_note)


class _Progress:
    """Adds up the bytes that are here, which never become fewer, and passes them on."""

    def __init__(self, report: OnProgress | None, files: Sequence[RemoteFile]) -> None:
        self._report = report
        self._total_bytes = sum(file.size_bytes for file in files)
        self._finished_bytes = 0
        self._shown_bytes = 0

    def __call__(self, file_bytes: int) -> None:
        """So much of the present file is here."""
        self._shown_bytes = max(self._shown_bytes, self._finished_bytes + file_bytes)
        if self._report is not None:
            self._report(self._shown_bytes, self._total_bytes)

    def finish(self, file: RemoteFile) -> None:
        self._finished_bytes += file.size_bytes
        self(0)


def _refuse_unsupported(fetching: Fetching, config: RemoteFile) -> None:
    """Read the configuration outside the cache: a model that does not run here leaves nothing behind."""
    blob = blob_path(fetching.source.repo_id, config.digest)
    with tempfile.TemporaryDirectory(prefix="mistral-") as directory:
        copy = Path(directory) / config.name
        if blob.is_file() and config.matches(blob):
            shutil.copyfile(blob, copy)
        else:
            fetching.fetch(config, copy, lambda _: None)
        read_config(Path(directory))


def _require_space(source: Source, files: list[RemoteFile]) -> None:
    needed = sum(_missing_bytes(source, file) for file in files)
    place = next(path for path in cache_directory().joinpath("x").parents if path.is_dir())
    free = free_bytes(place)
    if needed > free:
        raise DiskError(
            f"{source.request.model} needs {size_text(needed)}, and {place} has {size_text(free)} free",
            "free some space, or name a directory on a larger disk in HF_HOME",
        )


def _missing_bytes(source: Source, file: RemoteFile) -> int:
    """What a file will take beside what is here of it: without links, also where its content is here, for a copy."""
    path, blob = source.snapshot / file.name, blob_path(source.repo_id, file.digest)
    if path.is_file() or (blob.is_file() and not constants.HF_HUB_DISABLE_SYMLINKS):
        return 0
    return max(0, file.size_bytes - part_bytes(blob))


def _obtain(fetching: Fetching, file: RemoteFile, progress: OnBytes) -> None:
    """Have one file in the snapshot, as the Hub lists it; one that is damaged makes way, in all snapshots.

    Raises:
        MistralError: as `transfer.fetch`.
    """
    source = fetching.source
    path, blob = source.snapshot / file.name, blob_path(source.repo_id, file.digest)
    if path.is_file() and file.matches(path):
        return
    with our_errors(source.request), _locked(fetching, file):
        if path.is_file():
            if file.matches(path):
                return
            _discard(source, file)
        if blob.is_file() and not file.matches(blob):
            blob.unlink()
        is_new = not blob.is_file()
        if is_new:
            fetching.fetch(file, blob, progress)
        enter_snapshot(blob, path, is_new=is_new, use_links=not constants.HF_HUB_DISABLE_SYMLINKS)


@contextmanager
def _locked(fetching: Fetching, file: RemoteFile) -> Iterator[None]:
    """Hold the lock of a file's content, which huggingface_hub takes too; says so where another has it."""
    lock = lock_path(fetching.source.repo_id, file.digest)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=_LOCK_TRY_S))
        except Timeout:
            fetching.on_note(f"another program is fetching {file.name}: waiting for it")
            held.enter_context(WeakFileLock(lock))
        yield


def _discard(source: Source, file: RemoteFile) -> None:
    """Remove a damaged file from the cache, and from every snapshot that shares it; nothing outside the cache."""
    path = source.snapshot / file.name
    if path.resolve().is_relative_to(repo_directory(source.repo_id).resolve()):
        path.resolve().unlink()
    drop_dangling(source.repo_id)
    path.unlink(missing_ok=True)
