"""What a cache holds, in a file: a long prompt that many runs begin with is computed once.

A safetensors file: `token_ids`, and for each layer the slots in use of its keys and values, with their scales where
they are int8. Its metadata names the model by a digest, so that it is not used with another.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mistralcli.cache import KVCache
from mistralcli.engine import Engine
from mistralcli.errors import DiskError, IntegrityError, UsageError
from quant.files import STEMS, weight_files

if TYPE_CHECKING:
    from mistralcli.session import Session

FORMAT = "mistral-cache-1"
_OTHER = "name another file, or remove it and it is made again"
_SAMPLE_BYTES = 1 << 20
_SAMPLE_EVERY_BYTES = 16 << 20


def model_digest(directory: Path) -> str:
    """A digest of a model: its configuration, and of its weights' files the sizes, both ends and a page in every 16 MB.

    Reading all of a 7B would take as long as the prompt; two trainings differ everywhere.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "params.json"):
        if (directory / name).is_file():
            digest.update((directory / name).read_bytes())
    for name in [name for stem in STEMS for name in weight_files(directory, stem)]:
        with (directory / name).open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            digest.update(f"{name} {size_bytes}\n".encode() + file.read(_SAMPLE_BYTES))
            for start in range(_SAMPLE_BYTES, size_bytes, _SAMPLE_EVERY_BYTES):
                file.seek(start)
                digest.update(file.read(4096))
            file.seek(max(0, size_bytes - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def digest_of(session: "Session") -> str:
    """A digest of all that keys and values depend on beside the ids: the model, and how it computes."""
    return f"{model_digest(session.directory)} {session.computing}"


def save_cache(path: Path, engine: Engine, digest: str) -> None:
    """Write what the engine's cache holds, for its owner alone; whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    tensors = {"token_ids": torch.tensor(engine.token_ids)}
    for name, tensor in _held(engine):
        tensors[name] = tensor.contiguous().cpu()
    metadata = {"format": FORMAT, "model": digest, "capacities": json.dumps(_capacities(engine.cache))}
    metadata["furthest"] = str(engine.cache.furthest)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
        save_file(tensors, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{path} cannot be written: {error}", "name a file on a disk with room") from error
    finally:
        partial.unlink(missing_ok=True)


def saved_bytes(engine: Engine) -> int:
    """What `save_cache` would write of keys and values."""
    return sum(tensor.nbytes for _, tensor in _held(engine))


def _held(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """The slots in use of each layer's buffers, by their names in the file."""
    for i, layer in enumerate(engine.cache.layers):
        n_slots = min(len(engine.token_ids), layer.ring.capacity)
        for name, tensor in layer.buffers().items():
            yield f"{i}.{name}", tensor[:1, :, :n_slots]


def load_cache(path: Path, engine: Engine, digest: str, token_ids: Sequence[int]) -> None:
    """Fill the engine's empty cache with what `path` holds, which must be the beginning of `token_ids`.

    Raises:
        IntegrityError: it is no such file.
        UsageError: it is of another model, of another text, or of a cache of another kind.
    """
    saved = saved_ids(path, digest)
    if saved != list(token_ids[: len(saved)]):
        raise UsageError(f"{path} is of another text than this prompt begins with", _OTHER)
    try:
        with safe_open(path, framework="pt") as file:
            _fill(engine, file, saved, file.metadata() or {}, path)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is no saved cache: {error}", _OTHER) from error


def saved_ids(path: Path, digest: str) -> list[int]:
    """The ids whose keys and values `path` holds; nothing else of it is read.

    Raises:
        IntegrityError: it is no such file.
        UsageError: it is of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise IntegrityError(f"{path} is no saved cache", _OTHER)
            if about.get("model") != digest:
                raise UsageError(f"{path} is of another model", _OTHER)
            token_ids = file.get_tensor("token_ids").tolist()
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is no saved cache: {error}", _OTHER) from error
    if not isinstance(token_ids, list) or not token_ids:
        raise IntegrityError(f"{path} is no saved cache", _OTHER)
    return token_ids


def _fill(engine: Engine, file: safe_open, token_ids: list[int], about: dict[str, str], path: Path) -> None:
    cache, n_positions = engine.cache, len(token_ids)
    engine.require_room(n_positions)
    capacities: list[int] = json.loads(about.get("capacities", "[]"))
    ours = _capacities(cache)
    same_slots = len(ours) == len(capacities) and all(
        mine == theirs or n_positions <= min(mine, theirs)
        for mine, theirs in zip(ours, capacities, strict=False)
    )
    cache.rewind(0)
    cache.reserve(n_positions)
    for i, layer in enumerate(cache.layers):
        for name, buffer in layer.buffers().items():
            saved = file.get_tensor(f"{i}.{name}") if f"{i}.{name}" in file.keys() else None  # noqa: SIM118
            place = buffer[:1, :, : min(n_positions, layer.ring.capacity)]
            if not same_slots or saved is None or saved.dtype != place.dtype or saved.shape != place.shape:
                raise UsageError(
                    f"{path} was saved from a cache of another kind",
                    "give the same --ctx, --slack, --dtype and --kv, or remove it and it is made again",
                )
            place.copy_(saved)
    cache.hold(n_positions, max(n_positions - 1, int(about.get("furthest", -1))))
    engine.token_ids = token_ids


def _capacities(cache: KVCache) -> list[int]:
    return [layer.ring.capacity for layer in cache.layers]
