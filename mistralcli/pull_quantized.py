"""A build of a model on the Hub, without the model: `mistral pull --quantize`.

What belongs to the weights comes first, into a directory beside the build; then the shards, one after the other
(`remote_source`), by the flow that quantizes models that are here. The build has the same bytes, since nothing that it
holds depends on where the tensors came from; only the comparison with the source is left out, which is not here.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode

from mistralcli.config import hugging_face_config, read_config
from mistralcli.errors import (
    AccessError,
    DiskError,
    IntegrityError,
    MistralError,
    ModelNotFoundError,
    NetworkError,
    QualityError,
    UsageError,
)
from mistralcli.file_lock import try_lock
from mistralcli.hub import Fetching, is_offline, look_up
from mistralcli.hub_cache import blob_path, parse_hub_model
from mistralcli.hub_errors import our_errors
from mistralcli.hub_files import RemoteFile, choose_files
from mistralcli.hub_http import Patience
from mistralcli.remote_source import (
    DamagedShardError,
    Reader,
    RemoteCheckpoint,
    Shard,
    Spool,
    Stream,
    read_shard,
    remove_spooled,
)
from mistralcli.store import PARTIAL
from mistralcli.transfer import OnNote
from mistralcli.units import size_text
from mistralcli.weights import check_tensors
from quant.build_plan import BuildPlan, Recipe, open_model, plan_build
from quant.checkpoint import BuildReport, quantize_checkpoint
from quant.staging import JOURNAL, can_be_resumed, free_bytes, partial_of

OnProgress = Callable[[int, int], None]
_WEIGHTS = ".safetensors"
_OF_THE_HUB = (NetworkError, AccessError, ModelNotFoundError)


@dataclass(frozen=True)
class _Incoming:
    """A model that is being pulled into the build `destination`; `place`: where what belongs to it is meanwhile."""

    name: str
    fetching: Fetching
    shards: list[Shard]
    recipe: Recipe
    destination: Path
    place: Path
    progress: "_Progress"

    def checkpoint(self, reader: Reader) -> RemoteCheckpoint:
        return RemoteCheckpoint(self.place, self.shards, read_config(self.place), reader)

    def plan(self) -> BuildPlan:
        """What the build will hold; the tensors are those of the model that its configuration describes."""
        checkpoint = self.checkpoint(self.stream())
        check_tensors(read_config(self.place), checkpoint)
        return plan_build(open_model(checkpoint, self.place, self.hf_config()), self.recipe)

    def hf_config(self) -> dict[str, object] | None:
        """A Hugging Face configuration, where the model has none."""
        has_own = (self.place / "config.json").is_file()
        return None if has_own else dict(hugging_face_config(read_config(self.place)))

    def stream(self) -> Stream:
        tied = read_config(self.place).tied_embeddings
        return Stream(self.fetching, self.progress.fetched, unread=("lm_head.weight",) if tied else ())

    def spool(self) -> Spool:
        return Spool(self.fetching, self.place, self.progress.fetched)

    def build(self, reader: Reader) -> BuildReport:
        checkpoint = self.checkpoint(reader)
        return quantize_checkpoint(
            checkpoint,
            self.place,
            self.destination,
            self.recipe.scheme,
            head_scheme=self.recipe.head_scheme,
            method=self.recipe.method,
            config=self.hf_config(),
            source_name=self.name,
            revision=self.fetching.source.commit,
            together=checkpoint.together(),
            resume=True,
            on_progress=self.progress.built,
        )


def pull_quantized(
    model: str,
    destination: Path,
    recipe: Recipe,
    *,
    token: str | None,
    patience: Patience,
    on_progress: OnProgress,
    on_note: OnNote,
) -> BuildReport:
    """Build `model`, a Hub id, in `destination`.

    The disk holds the build and one shard, or where that does not fit, the build and little more.
    Goes on with what an earlier call for the same build left.

    Raises:
        UsageError: the destination exists, the model is quantized, or a half-made build was begun with other options.
        IntegrityError: a file came twice with another hash; what was made of others is kept.
        DiskError: there is not even room for the build.
        MistralError: as `hub.pull` and `quantize_checkpoint`.
    """
    if destination.exists() and not (destination / JOURNAL).is_file():  # which one has whose end was cut off
        raise UsageError(
            f"{destination} exists already", "choose another name with -o, or remove it with `mistral rm`"
        )
    wanted = parse_hub_model(model)
    if is_offline_mode():
        raise is_offline(f"the weights of {wanted} come from the Hub to be quantized")
    source, listing = look_up(wanted, token, patience, on_note)
    files = choose_files(wanted.repo_id, listing)
    fetching = Fetching(source, patience, on_note)
    place = destination.with_name(f"{destination.name}.spool{PARTIAL}")
    try:
        with our_errors(source.request):
            place.mkdir(parents=True, exist_ok=True)
        with _claimed(place, destination):
            incoming = _incoming(model, fetching, files, recipe, destination, place, on_progress)
            report = _build(incoming, on_note)
    except (*_OF_THE_HUB, DiskError) as error:
        raise _kept(error, destination) from error
    except QualityError:
        shutil.rmtree(place)  # the build is there, marked
        raise
    shutil.rmtree(place)
    return report


@contextmanager
def _claimed(place: Path, destination: Path) -> Iterator[None]:
    """Lock the directory, so that no other process fetches into it or removes it."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise UsageError(
                f"another process is making {destination}", "wait for it, or choose another name"
            )
        yield
    finally:
        os.close(descriptor)


def _incoming(
    model: str,
    fetching: Fetching,
    files: list[RemoteFile],
    recipe: Recipe,
    destination: Path,
    place: Path,
    on_progress: OnProgress,
) -> _Incoming:
    """Have what belongs to the weights in `place`, and of them the headers."""
    small = [file for file in files if not file.name.endswith(_WEIGHTS)]
    for file in small:
        _have(fetching, file, place / file.name)
    try:
        read_config(place)  # a model that does not run here is refused before its headers are asked for
    except MistralError:
        if not can_be_resumed(destination):
            shutil.rmtree(place)
        raise
    shards = [read_shard(fetching, file) for file in files if file not in small]
    progress = _Progress(on_progress, sum(shard.file.size_bytes for shard in shards))
    return _Incoming(model, fetching, shards, recipe, destination, place, progress)


def _have(fetching: Fetching, file: RemoteFile, path: Path) -> None:
    """A small file, from the cache where it is there."""
    if path.is_file() and file.matches(path):
        return
    path.unlink(missing_ok=True)
    blob = blob_path(fetching.source.repo_id, file.digest)
    if blob.is_file() and file.matches(blob):
        shutil.copyfile(blob, path)
    else:
        fetching.fetch(file, path, lambda _: None)


def _build(incoming: _Incoming, on_note: OnNote) -> BuildReport:
    """By way of the disk where it has room, else through memory, where a shard that is damaged comes once more."""
    plan = incoming.plan()
    build_bytes = plan.size_bytes + plan.card_bytes
    largest = max(shard.file.size_bytes for shard in incoming.shards)
    room = free_bytes(incoming.place) + _taken(incoming.place) + _taken(partial_of(incoming.destination))
    if room >= build_bytes + largest:
        return _whole(incoming, incoming.spool())
    if room < build_bytes:
        raise DiskError(
            f"the build takes {size_text(build_bytes)}, and {incoming.place.parent} has {size_text(room)} free"
        )
    on_note(
        f"the disk has no room for a shard of {size_text(largest)}: it goes through memory, tensor by tensor"
    )
    remove_spooled(incoming.place)
    damaged: set[str] = set()
    while True:
        try:
            return incoming.build(incoming.stream())
        except DamagedShardError as error:
            if error.file.name in damaged:
                raise _named(error, incoming) from error
            damaged.add(error.file.name)


def _whole(incoming: _Incoming, reader: Reader) -> BuildReport:
    try:
        return incoming.build(reader)
    except DamagedShardError as error:
        raise _named(error, incoming) from error


def _named(error: DamagedShardError, incoming: _Incoming) -> IntegrityError:
    return IntegrityError(
        f"{error.file.name} of {incoming.name} is not what {incoming.fetching.source.request.host} lists: "
        "it came twice with another hash",
        "it is damaged on the Hub or on the way: the same command later goes on with what is done",
    )


def _kept(error: MistralError, destination: Path) -> MistralError:
    """The same error, saying what is kept; of the disk, where another place for all of it is named."""
    kept = f"what is done of {destination.name} is kept: the same command goes on with it"
    hint = (
        "free some space, or name another directory with -o" if isinstance(error, DiskError) else error.hint
    )
    kind = next(kind for kind in (*_OF_THE_HUB, DiskError) if isinstance(error, kind))
    return kind(error.message, f"{hint}; {kept}" if hint else kept)


def _taken(directory: Path) -> int:
    """What the files of a directory, if it is there, take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in directory.glob("*") if path.is_file())


class _Progress:
    """What has come and what was made of it, as one number."""

    def __init__(self, report: OnProgress, fetch_bytes: int) -> None:
        self._report, self._fetch_bytes = report, fetch_bytes
        self._fetched = self._built = self._build_bytes = 0

    def fetched(self, n_bytes: int) -> None:
        self._fetched = min(self._fetched + n_bytes, self._fetch_bytes)
        self._show()

    def built(self, done_bytes: int, total_bytes: int) -> None:
        self._built, self._build_bytes = done_bytes, total_bytes
        self._show()

    def _show(self) -> None:
        self._report(
            self._fetched + self._built, self._fetch_bytes + max(self._build_bytes, self._fetch_bytes)
        )
