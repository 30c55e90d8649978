"""What pulling a model would take, before it is pulled: files, bytes, disk, and where it would run.

The Hub is asked for its listing, the configuration, and the headers of the weights (`remote_tensors`).
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import is_offline_mode

from mistralcli.config import ModelConfig, read_config
from mistralcli.dense_weights import seen_tensors
from mistralcli.device import DTYPES, choose_dtype, default_chunk, free_memory_bytes
from mistralcli.errors import (
    AccessError,
    IntegrityError,
    NotEnoughMemoryError,
    UsageError,
)
from mistralcli.hub import Fetching, Source, is_offline, look_up
from mistralcli.hub_cache import parse_hub_model, repo_directory
from mistralcli.hub_files import RemoteFile, choose_files
from mistralcli.hub_http import DEFAULT_PATIENCE, Patience, patiently
from mistralcli.plan import (
    CTX_STEP,
    choose_cache_dtype,
    default_ctx,
    default_slack,
    demand_of,
    fitting_plan,
    plan_memory,
)
from mistralcli.remote_tensors import RemoteTensors, read_small, read_tensors
from mistralcli.transfer import OnNote, part_bytes
from mistralcli.weights import check_tensors, keeps_embedding, sizes_once_loaded
from quant.checkpoint import MAX_SHARD_BYTES
from quant.files import QUANTIZE_CONFIG
from quant.plan import PlannedTensor, into_shards, plan_tensors
from quant.safetensors_file import file_size_bytes
from quant.scheme import default_head_scheme, parse_scheme
from quant.tensors import TensorSpec

BUILDS = {"int8": 8, "int4": 4}
"""The builds that are sized, by their scheme's name: what `mistral quantize --bits` makes with no other flag."""

AS_IT_IS = "as it is"

_REASONS = (
    ("another format of the weights", (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5")),
    ("another format of the weights", (".msgpack", ".ot", ".pkl", ".npz", ".mlmodel", ".tflite")),
    ("a second copy of the weights", (".safetensors", ".safetensors.index.json")),
    ("code, which is never run", (".py", ".ipynb", ".sh", ".so", ".js")),
    (
        "documents and pictures",
        (".md", ".txt", ".pdf", ".html", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
    ),
)
"""Why a file that was not chosen is left out, by the end of its name."""
_NOT_NEEDED = "not needed to run it"


@dataclass(frozen=True)
class LeftOut:
    """A file of the repository that a pull does not take, and the class of reasons why."""

    file: RemoteFile
    reason: str


@dataclass(frozen=True)
class Fit:
    """Whether the model, `as` it is or as a build, would run on a device, and how.

    ctx: the context that a run would get by default, in tokens; None where not even the shortest fits.
    needed_bytes: weights, cache and workspace at that context, or at the shortest.
    """

    build: str
    device: str
    free_bytes: int
    ctx: int | None
    needed_bytes: int


@dataclass(frozen=True)
class Weights:
    """What the headers tell: the exact bytes of builds' weight files by scheme, and what fits where.

    `no_builds` says why the model cannot be quantized, where it cannot.
    """

    builds: Mapping[str, int]
    no_builds: str | None
    fits: Sequence[Fit]


@dataclass(frozen=True)
class PullPlan:
    """What `mistral pull` would do. All sizes in bytes.

    here: how much of each chosen file is in the cache, by its name. place: a directory on the disk that the rest goes
    to.
    weights: None where the Hub shows the listing but not the files; `refusal` then says why.
    """

    source: Source
    chosen: Sequence[RemoteFile]
    here: Mapping[str, int]
    left_out: Sequence[LeftOut]
    place: Path
    free_bytes: int
    weights: Weights | None
    refusal: AccessError | None

    @property
    def fetch_bytes(self) -> int:
        return sum(file.size_bytes for file in self.chosen) - self.here_bytes

    @property
    def here_bytes(self) -> int:
        return sum(self.here.values())


def plan_pull(
    model: str,
    *,
    token: str | None = None,
    patience: Patience = DEFAULT_PATIENCE,
    on_note: OnNote = lambda _: None,
) -> PullPlan:
    """Ask the Hub what pulling `model` would take. Writes nothing but to a temporary directory.

    `patience` and `on_note` as in `hub.pull`.

    Raises:
        IntegrityError: a header is none, or weights and configuration are not of one model.
        MistralError: as `hub.pull`.
    """
    wanted = parse_hub_model(model)
    if is_offline_mode():
        raise is_offline(f"a plan for {wanted} needs the Hub")
    source, listing = look_up(wanted, token, patience, on_note)
    fetching = Fetching(source, patience, on_note)
    chosen = choose_files(wanted.repo_id, listing)
    names = {file.name for file in chosen}
    blobs = repo_directory(wanted.repo_id) / "blobs"
    place = next(path for path in blobs.parents if path.is_dir())
    weights, refusal = None, None
    try:
        weights = patiently(lambda: _weights(fetching, chosen), patience, on_note)
    except AccessError as error:
        refusal = error
    return PullPlan(
        source,
        chosen,
        {file.name: _here_bytes(blobs / file.digest, file) for file in chosen},
        [LeftOut(file, left_out_because(file.name)) for file in listing if file.name not in names],
        place,
        shutil.disk_usage(place).free,
        weights,
        refusal,
    )


def _here_bytes(blob: Path, file: RemoteFile) -> int:
    """All of a finished file, or what a part file has of it, which a pull goes on with."""
    is_whole = blob.is_file() and blob.stat().st_size == file.size_bytes
    return file.size_bytes if is_whole else min(part_bytes(blob), file.size_bytes)


def left_out_because(name: str) -> str:
    """The class of reasons why a file that was not chosen is left out."""
    base = PurePosixPath(name.lower()).name
    found = (reason for reason, suffixes in _REASONS if base.endswith(suffixes))
    return next(found, "documents and pictures" if base.startswith((".", "readme")) else _NOT_NEEDED)


def _weights(fetching: Fetching, chosen: Sequence[RemoteFile]) -> Weights:
    config = _read_config(fetching, [chosen[0], *(file for file in chosen if file.name == QUANTIZE_CONFIG)])
    tensors = read_tensors(fetching, chosen)
    if chosen[0].name == "params.json":  # which does not state the type
        config = replace(config, dtype=str(tensors.spec(tensors.names()[0]).dtype).removeprefix("torch."))
    check_tensors(config, tensors)
    try:
        planned, no_builds = {name: _plan_build(bits, config, tensors) for name, bits in BUILDS.items()}, None
    except UsageError as error:
        planned, no_builds = {}, error.message
    seen = seen_tensors(tensors.specs, config, tensors.directory).specs
    stored = {AS_IT_IS: seen} | {name: _stored(tensors) for name, tensors in planned.items()}
    return Weights(
        {name: _file_bytes(tensors) for name, tensors in planned.items()},
        no_builds,
        [fit for device in _devices() for fit in _fits(stored, config, device)],
    )


def _read_config(fetching: Fetching, files: Sequence[RemoteFile]) -> ModelConfig:
    """The configuration, in all the files that state it, held to the Hub's hashes, and read where it leaves nothing."""
    request = fetching.source.request
    with tempfile.TemporaryDirectory(prefix="mistral-") as directory:
        for file in files:
            path = Path(directory) / file.name
            path.write_bytes(read_small(fetching, file))
            if not file.matches(path):
                raise IntegrityError(
                    f"{file.name} of {request.model} is not what {request.host} lists, by size or hash",
                    "it was damaged on the way: try again",
                )
        return read_config(Path(directory))


def _plan_build(bits: int, config: ModelConfig, tensors: RemoteTensors) -> list[PlannedTensor]:
    """The tensors of the build that `mistral quantize --bits` would make.

    Raises:
        UsageError: the model cannot be quantized.
    """
    if config.quantization:
        raise UsageError("it is quantized already")
    if config.dtype not in DTYPES:
        raise UsageError(f"a model in {config.dtype} cannot be quantized")
    scheme, dtype = parse_scheme(bits), DTYPES[config.dtype]
    return plan_tensors(
        tensors, scheme, default_head_scheme(scheme), tied=config.tied_embeddings, dtype=dtype
    )


def _stored(planned: Sequence[PlannedTensor]) -> dict[str, TensorSpec]:
    return {name: spec for tensor in planned for name, spec in tensor.stored.items()}


def _file_bytes(planned: Sequence[PlannedTensor]) -> int:
    shards = into_shards(planned, MAX_SHARD_BYTES).values()
    return sum(file_size_bytes(_stored(tensors)) for tensors in shards)


def _devices() -> Iterator[torch.device]:
    """What `--device` may name here and a run would choose."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield torch.device("cuda", index)
    yield torch.device("cpu")


def _fits(
    stored: Mapping[str, Mapping[str, TensorSpec]], config: ModelConfig, device: torch.device
) -> Iterator[Fit]:
    free_bytes = free_memory_bytes(device)
    for build, specs in stored.items():
        yield _fit(build, specs, config, device, free_bytes)


def _fit(
    build: str, stored: Mapping[str, TensorSpec], config: ModelConfig, device: torch.device, free_bytes: int
) -> Fit:
    """As a run without flags would plan it."""
    dtype = choose_dtype(None, device)
    demand = demand_of(
        sizes_once_loaded(stored, keeps_embedding(config, device.type), dtype),
        dtype,
        default_chunk(device, free_bytes),
        default_slack(device, free_bytes),
        device.type,
        choose_cache_dtype(None, dtype, device.type),
    )
    try:
        plan = fitting_plan(config, demand, free_bytes)
    except NotEnoughMemoryError:
        least = plan_memory(config, demand, min(CTX_STEP, default_ctx(config)), free_bytes)
        return Fit(build, str(device), free_bytes, None, least.total_bytes)
    return Fit(build, str(device), free_bytes, plan.ctx, plan.total_bytes)
