"""A model's weights as they come from the Hub, for the quantizer: a shard at a time, and nothing of it before its hash.

Where the disk has room the shard that is being fetched is spooled: downloaded as any file (`transfer`), so that an
interruption resumes inside it, checked, mapped, and removed when the next one begins. Where it has not, the shard
streams: one tensor at a time is in memory, and the hash is known with the last of them. So its tensors are recorded as
one unit, behind the last; what stops it before starts that shard again.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from mistralcli.checkpoint_files import rotate_half_order, translated_name
from mistralcli.config import ModelConfig
from mistralcli.errors import IntegrityError, NetworkError
from mistralcli.hub import Fetching
from mistralcli.hub_cache import PART_SUFFIX
from mistralcli.hub_files import RemoteFile
from mistralcli.hub_http import TryAgainError, patiently
from mistralcli.remote_tensors import parse_header, read_start
from quant.files import open_tensors
from quant.plan import layer_index
from quant.tensors import TensorSpec

OnBytes = Callable[[int], None]
"""Called with the bytes that came since the last call."""

_LENGTH_BYTES = 8
_FIRST_BYTES = 64 << 10


class DamagedShardError(NetworkError):
    """A shard came with another hash than the Hub lists. What was made of others is right, and is kept."""

    def __init__(self, file: RemoteFile, host: str) -> None:
        super().__init__(f"{file.name} is not what {host} lists, by its hash")
        self.file = file


@dataclass(frozen=True)
class Shard:
    """A file of weights: its tensors by their Hugging Face names, in the order of their bytes behind the header."""

    file: RemoteFile
    data_start: int
    stored_names: Mapping[str, str]
    specs: Mapping[str, TensorSpec]


class Reader(Protocol):
    """How the bytes of shards are come by."""

    def read(self, shard: Shard, name: str) -> torch.Tensor:
        """A tensor as it is stored. They are asked for in the order of the shards and of their tensors."""
        ...

    def release(self) -> None:
        """Let go of what is mapped."""
        ...

    def together(self, shard: Shard) -> list[list[str]]:
        """Tensors that are recorded together: what is read with them is right when all of them have been read."""
        ...


class RemoteCheckpoint:
    """The shards of a model on the Hub as a `TensorSource`: each tensor is loaded once, in the order of `names`."""

    def __init__(self, directory: Path, shards: Sequence[Shard], config: ModelConfig, reader: Reader) -> None:
        self.directory = directory
        self._shards = list(shards)
        self._reader = reader
        self._shard_of = {name: shard for shard in shards for name in shard.specs}
        self._heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}

    def names(self) -> Sequence[str]:
        return list(self._shard_of)

    def together(self) -> list[list[str]]:
        """The names, as they are recorded."""
        return [names for shard in self._shards for names in self._reader.together(shard)]

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        return self._listed()

    def hash_bytes(self) -> int:
        return 0

    def hashes(self, on_read: Callable[[int], None]) -> dict[str, dict[str, Any]]:
        """As the Hub lists them, which is what came."""
        return self._listed()

    def _listed(self) -> dict[str, dict[str, Any]]:
        files = (shard.file for shard in self._shards)
        return {file.name: {"size_bytes": file.size_bytes, "sha256": file.digest} for file in files}

    def spec(self, name: str) -> TensorSpec:
        return self._shard_of[name].specs[name]

    def load(self, name: str) -> torch.Tensor:
        """One tensor; of Mistral's own layout, rows of wq and wk in Hugging Face's order."""
        shard = self._shard_of[name]
        tensor = self._reader.read(shard, name)
        n_heads = self._heads.get(name.split(".")[-2]) if name.endswith(".weight") else None
        is_own = shard.file.name.startswith("consolidated")
        return rotate_half_order(tensor, n_heads) if is_own and n_heads is not None else tensor

    def release(self) -> None:
        self._reader.release()


def read_shard(fetching: Fetching, file: RemoteFile) -> Shard:
    """What a file of weights holds, from its header.

    Raises:
        IntegrityError: it has no sound header, or bytes that belong to no tensor, or is not in LFS, without a SHA-256.
    """

    def start_of(n_bytes: int) -> bytes:
        return patiently(lambda: read_start(fetching, file, n_bytes), fetching.patience, fetching.on_note)

    start = start_of(min(_FIRST_BYTES, file.size_bytes))
    data_start = _LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "little")
    if data_start > min(file.size_bytes, 16 << 20) or len(file.digest) != 64:
        raise _unsound(file)
    header = (start if len(start) >= data_start else start_of(data_start))[_LENGTH_BYTES:data_start]
    specs, entries = parse_header(file, header), json.loads(header)
    names = sorted(specs, key=lambda name: (entries[name]["data_offsets"][0], specs[name].nbytes))
    position = 0
    for name in names:
        if entries[name]["data_offsets"][0] != position:
            raise _unsound(file)
        position += specs[name].nbytes
    is_own = file.name.startswith("consolidated")
    stored = {translated_name(name) if is_own else name: name for name in names}
    return Shard(file, data_start, stored, {ours: specs[name] for ours, name in stored.items()})


def _unsound(file: RemoteFile) -> IntegrityError:
    return IntegrityError(
        f"{file.name} is not a sound safetensors file by its header",
        "tell the model's owner, or pull another model",
    )


def remove_spooled(directory: Path, *, but: str = "") -> None:
    """Remove the shards that are there, whole or in part, but for one."""
    for pattern in ("*.safetensors", f"*.safetensors{PART_SUFFIX}*"):
        for path in directory.glob(pattern):
            if not but or not path.name.startswith(but):
                path.unlink()


class Spool:
    """Shards by way of the disk, one at a time."""

    def __init__(self, fetching: Fetching, directory: Path, on_bytes: OnBytes) -> None:
        self._fetching = fetching
        self._directory = directory
        self._on_bytes = on_bytes
        self._current: RemoteFile | None = None
        self._mapped: Any = None

    def read(self, shard: Shard, name: str) -> torch.Tensor:
        if self._current != shard.file:
            self._turn_to(shard.file)
        if self._mapped is None:
            self._mapped = open_tensors(self._directory / shard.file.name)
        tensor: torch.Tensor = self._mapped.get_tensor(shard.stored_names[name])
        return tensor

    def _turn_to(self, file: RemoteFile) -> None:
        """Have a shard on the disk, and no other."""
        self.release()
        remove_spooled(self._directory, but=file.name)
        path = self._directory / file.name
        seen = 0

        def report(n_bytes: int) -> None:
            nonlocal seen
            self._on_bytes(max(0, n_bytes - seen))
            seen = max(seen, n_bytes)

        if path.is_file() and not file.matches(path):
            path.unlink()
        if not path.is_file():
            try:
                self._fetching.fetch(file, path, report)
            except IntegrityError as error:
                raise DamagedShardError(file, self._fetching.source.request.host) from error
        report(file.size_bytes)
        self._current = file

    def release(self) -> None:
        self._mapped = None

    def together(self, shard: Shard) -> list[list[str]]:
        """By layer: the hash was right before any of them is read."""
        return [list(names) for _, names in groupby(shard.specs, key=layer_index)]


class Stream:
    """Shards through memory, a tensor at a time."""

    def __init__(self, fetching: Fetching, on_bytes: OnBytes, unread: Collection[str] = ()) -> None:
        """`unread`: tensors that nobody will ask for, such as a head that the embedding stands in for."""
        self._fetching = fetching
        self._on_bytes = on_bytes
        self._unread = frozenset(unread)
        self._current: RemoteFile | None = None

    def read(self, shard: Shard, name: str) -> torch.Tensor:
        """A tensor; with the last of a shard its hash is known. Raises DamagedShardError where that is wrong."""
        if self._current != shard.file:
            self._current, self._digest = shard.file, shard.file.new_hash()
            self._pieces, self._rest = self._receive(shard.file), memoryview(b"")
            self._coming = iter(shard.specs)
            self._take(shard.data_start)
        spec = shard.specs[name]
        for passed in self._coming:
            data = self._take(shard.specs[passed].nbytes)
            if passed == name:
                break
        if name == [one for one in shard.specs if one not in self._unread][-1]:
            for rest in self._coming:
                self._take(shard.specs[rest].nbytes)
            if self._digest.hexdigest() != shard.file.digest:
                raise DamagedShardError(shard.file, self._fetching.source.request.host)
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(data, dtype=spec.dtype).view(spec.shape)

    def _take(self, n_bytes: int) -> bytearray:
        """The next bytes, which are hashed."""
        data, filled = bytearray(n_bytes), 0
        while filled < n_bytes:
            if not self._rest:
                try:
                    self._rest = next(self._pieces)
                except IntegrityError as error:  # of another length than listed, or gone
                    assert self._current is not None
                    raise DamagedShardError(self._current, self._fetching.source.request.host) from error
            piece = self._rest[: n_bytes - filled]
            data[filled : filled + len(piece)] = piece
            filled, self._rest = filled + len(piece), self._rest[len(piece) :]
        self._digest.update(data)
        self._on_bytes(n_bytes)
        return data

    def _receive(self, file: RemoteFile) -> Iterator[memoryview]:
        """The bytes of a file in order, whatever the network does, as long as patience allows: each until the next."""
        remote, patience = self._fetching.remote(file), self._fetching.patience
        position = failures = 0
        while position < file.size_bytes:
            before = position
            try:
                with remote.open(position, file.size_bytes) as body:
                    at = body.start
                    for piece in body.pieces():
                        new = piece[max(0, position - at) :]
                        at += len(piece)
                        position += len(new)
                        if new:
                            yield new
            except TryAgainError as failure:
                failures = 1 if position > before else failures + 1
                if failures > patience.retries or (failure.after_s or 0) > patience.longest_asked_s:
                    raise failure.final from failure
                time.sleep(patience.wait_s(failures, failure.after_s))

    def release(self) -> None:
        """Nothing is mapped."""

    def together(self, shard: Shard) -> list[list[str]]:
        """All of it."""
        return [list(shard.specs)]
