"""Pull a model from the Hugging Face Hub into the cache that all its tools share, through huggingface_hub.

What comes is checked against the sizes and hashes that the Hub lists, which huggingface_hub does not do.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, is_offline_mode
from huggingface_hub.utils.tqdm import tqdm

from mistralcli import __version__
from mistralcli.config import read_config
from mistralcli.errors import AccessError, DiskError, IntegrityError, NetworkError
from mistralcli.hub_cache import (
    HubModel,
    cache_directory,
    drop_dangling,
    find_snapshot,
    parse_hub_model,
    repo_directory,
    write_ref,
)
from mistralcli.hub_errors import HubRequest, hub_endpoint, not_the_hub, our_errors
from mistralcli.hub_files import RemoteFile, choose_files
from mistralcli.store import checkpoint_problem
from mistralcli.units import size_text

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are here, and with the bytes of all files."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_LIBRARY = "mistral-cli"
"""How we introduce ourselves to the Hub."""


@dataclass(frozen=True)
class _Source:
    """One commit of one repository, and what it takes to ask for its files; `token` is False for none."""

    request: HubRequest
    token: str | Literal[False]
    commit: str

    @property
    def repo_id(self) -> str:
        return self.request.model.repo_id

    @property
    def snapshot(self) -> Path:
        return repo_directory(self.repo_id) / "snapshots" / self.commit

    def download(self, name: str, **options: Any) -> Path:
        """Have huggingface_hub put one file in its place, unless it is there."""
        with our_errors(self.request):
            return Path(
                hf_hub_download(
                    self.repo_id,
                    name,
                    revision=self.commit,
                    cache_dir=cache_directory(),
                    endpoint=self.request.endpoint,
                    token=self.token,
                    library_name=_LIBRARY,
                    library_version=__version__,
                    **options,
                )
            )


def pull(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download one runnable copy of `model` (`OWNER/NAME`, or with `@REVISION`) and return its directory.

    Files that are here already are checked, and fetched again only when they are damaged. The branch or tag
    is recorded last, so that it never names an unfinished download. HF_ENDPOINT, HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE are honoured; offline, a model that is here whole is returned as it is.

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
    _require_cache()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it would warn of, our errors say
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it also sends which agent runs it and torch's version
    source, listing = _list_files(wanted, *find_token(token))
    files = choose_files(wanted.repo_id, listing)
    _refuse_unsupported(source, files[0])
    _require_space(source, files)
    done, total = 0, sum(file.size_bytes for file in files)
    for file in files:
        _obtain(source, file, _bar_class(on_progress, done, total))
        done += file.size_bytes
        if on_progress is not None:
            on_progress(done, total)
    problem = checkpoint_problem(source.snapshot)
    if problem is not None:
        raise IntegrityError(
            f"{wanted} is incomplete on the Hub: {problem}", f"tell its owner at {source.request.page}"
        )
    write_ref(wanted, source.commit)
    return source.snapshot


def _already_here(model: HubModel) -> Path:
    snapshot = find_snapshot(model)
    if snapshot is None or checkpoint_problem(snapshot) is not None:
        raise NetworkError(
            f"{model} is not on this machine, and HF_HUB_OFFLINE forbids asking the Hub",
            "unset HF_HUB_OFFLINE and pull again",
        )
    return snapshot


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
        except OSError as error:
            raise AccessError(
                f"the token cannot be read from {source}: {error.strerror}", "give one in HF_TOKEN"
            ) from error
    if not token:
        return False, None
    if not _TOKEN.fullmatch(token):
        raise AccessError(f"the token from {source} has characters that no token has", "copy it again")
    return token, source


def _list_files(
    model: HubModel, token: str | Literal[False], token_source: str | None
) -> tuple[_Source, list[RemoteFile]]:
    """Ask the Hub which commit `model` is at, and for the name, size and hash of every file in it."""
    request = HubRequest(model, hub_endpoint(), token_source)
    with our_errors(request):
        api = HfApi(request.endpoint, token, library_name=_LIBRARY, library_version=__version__)
        try:
            info = api.model_info(
                model.repo_id,
                revision=model.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            files = [_remote_file(sibling) for sibling in info.siblings or ()]
            return _Source(request, token, _commit(info.sha)), files
        except (AttributeError, KeyError, TypeError) as error:
            raise not_the_hub(error, request) from error


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


def _refuse_unsupported(source: _Source, config: RemoteFile) -> None:
    """Read the configuration outside the cache: a model that does not run here leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="mistral-") as directory:
        source.download(config.name, local_dir=directory)
        read_config(Path(directory))


def _require_space(source: _Source, files: list[RemoteFile]) -> None:
    blobs = repo_directory(source.repo_id) / "blobs"
    needed = sum(file.size_bytes for file in files if not (blobs / file.digest).is_file())
    place = next(path for path in blobs.parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DiskError(
            f"{source.request.model} needs {size_text(needed)}, and {place} has {size_text(free)} free",
            "free some space, or name a directory on a larger disk in HF_HOME",
        )


def _obtain(source: _Source, file: RemoteFile, bar_class: type) -> None:
    """Have one file in the snapshot, as the Hub lists it.

    Raises:
        IntegrityError: what was downloaded is something else; it has been removed.
    """
    path = source.snapshot / file.name
    if path.is_file() and file.matches(path):
        return
    if path.is_file():
        _discard(source, file)
    source.download(file.name, tqdm_class=bar_class)
    if not file.matches(path):
        _discard(source, file)
        raise IntegrityError(
            f"{file.name} of {source.request.model} is not what {source.request.host} lists, by size or hash",
            "the download was damaged on the way and has been removed: pull again",
        )


def _discard(source: _Source, file: RemoteFile) -> None:
    """Remove a damaged file from the cache, and from every snapshot that shares it."""
    path = source.snapshot / file.name
    path.resolve().unlink()
    drop_dangling(source.repo_id)
    path.unlink(missing_ok=True)


def _bar_class(on_progress: OnProgress | None, done: int, total: int) -> type:
    """A silent progress bar for huggingface_hub, which reports to ours; `done` bytes were here before."""

    class Bar(tqdm):
        fetched = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.fetched += int(n or 0)
            if on_progress is not None:
                on_progress(done + self.fetched, total)

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which Xet counts apart from bytes on the disk."""

        def set_transfer_postfix_str(self, *args: Any, **options: Any) -> None:
            """The speed of the former."""

    return Bar
