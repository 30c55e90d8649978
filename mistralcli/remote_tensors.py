"""Names, types and shapes of the tensors of a model on the Hub, by HTTP ranges: the weights themselves stay there.

A safetensors file begins with the length of its header, 8 bytes, and the header, which is JSON. All that comes is
foreign: lengths are bounded before anything of that length is read, and a header must account for its whole file.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from mistralcli.checkpoint_files import DTYPES, translated_name
from mistralcli.errors import IntegrityError, NetworkError
from mistralcli.hub import Fetching
from mistralcli.hub_cache import repo_directory
from mistralcli.hub_files import RemoteFile
from mistralcli.hub_http import TryAgainError
from quant.tensors import TensorSpec

_LENGTH_BYTES = 8
_FIRST_BYTES = 64 << 10
"""Asked for at first: a 7B model's headers have 10 to 40 kB."""
_LONGEST_HEADER_BYTES = 16 << 20
"""A 123B model's have 0.1 MB in all."""
_LONGEST_SMALL_BYTES = 4 << 20
"""More than a configuration has, or an index."""


class RemoteTensors:
    """The tensors of a model on the Hub under their Hugging Face names, as far as headers tell."""

    def __init__(self, directory: str, specs: Mapping[str, TensorSpec]) -> None:
        self.directory = directory
        self.specs = dict(specs)

    def names(self) -> Sequence[str]:
        return sorted(self.specs)

    def spec(self, name: str) -> TensorSpec:
        return self.specs[name]


def read_tensors(fetching: Fetching, files: Sequence[RemoteFile]) -> RemoteTensors:
    """The tensors in those of the `files` that are safetensors, from their headers.

    Raises:
        IntegrityError: a header is none, or is longer than any sound one, or two files have a tensor of one name.
        MistralError: the Hub cannot be asked; as `hub.pull`.
    """
    specs: dict[str, TensorSpec] = {}
    for file in files:
        if file.name.endswith(".safetensors"):
            own = {_name(file, name): spec for name, spec in read_header(fetching, file).items()}
            twice = own.keys() & specs.keys()
            if twice:
                raise _unsound(file, f"the tensor {min(twice)!r} is in another file too")
            specs |= own
    request = fetching.source.request
    return RemoteTensors(f"{request.model} on {request.host}", specs)


def _name(file: RemoteFile, name: str) -> str:
    return translated_name(name) if file.name.startswith("consolidated") else name


def read_header(fetching: Fetching, file: RemoteFile) -> dict[str, TensorSpec]:
    """The tensors of one safetensors file."""
    start = read_start(fetching, file, min(_FIRST_BYTES, file.size_bytes))
    length = _header_bytes(file, start)
    if len(start) < _LENGTH_BYTES + length:
        start = read_start(fetching, file, _LENGTH_BYTES + length)
    return parse_header(file, start[_LENGTH_BYTES : _LENGTH_BYTES + length])


def _header_bytes(file: RemoteFile, start: bytes) -> int:
    if len(start) < _LENGTH_BYTES:
        raise _unsound(file, f"it has {len(start)} bytes")
    (length,) = struct.unpack_from("<Q", start)
    if length > min(_LONGEST_HEADER_BYTES, file.size_bytes - _LENGTH_BYTES):
        raise _unsound(file, f"its header is said to have {length:,} bytes")
    return int(length)


def parse_header(file: RemoteFile, header: bytes) -> dict[str, TensorSpec]:
    """The tensors that a header states, which make up the whole file behind it.

    Raises:
        IntegrityError: it is no header, or it is that of another file.
    """
    try:
        entries = json.loads(header)
        specs = {name: _spec(entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _unsound(file, "its header is not one of tensors") from None
    stated, actual = sum(map(_size_bytes, specs.values())), file.size_bytes - _LENGTH_BYTES - len(header)
    if stated != actual:
        raise _unsound(file, f"its tensors have {stated:,} bytes, of {actual:,} that the file has for them")
    return specs


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    """One entry. Raises ValueError, TypeError or KeyError where it is none, or of a type that we do not know."""
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError("no shape")
    spec = TensorSpec(tuple(shape), DTYPES[entry["dtype"]])
    if len(shape) > 8 or end - start != _size_bytes(spec):
        raise ValueError("no place")
    return spec


def _size_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _unsound(file: RemoteFile, why: str) -> IntegrityError:
    return IntegrityError(
        f"{file.name} is not a sound safetensors file: {why}", "tell the model's owner, or pull another model"
    )


def read_small(fetching: Fetching, file: RemoteFile) -> bytes:
    """All of a small file: a configuration or an index.

    Raises:
        IntegrityError: it is larger than any of those, or not what the Hub lists.
    """
    if file.size_bytes > _LONGEST_SMALL_BYTES:
        model = fetching.source.request.model
        raise IntegrityError(
            f"{file.name} of {model} has {file.size_bytes:,} bytes, which is no sound size for it",
            "tell the model's owner, or pull another model",
        )
    return read_start(fetching, file, file.size_bytes)


def read_start(fetching: Fetching, file: RemoteFile, n_bytes: int) -> bytes:
    """The first `n_bytes` of a file: of the copy in the cache where there is one, else from the Hub.

    No more is ever read, whatever the server sends.

    Raises:
        NetworkError: the server ends before that, or answers with something else.
    """
    here = repo_directory(fetching.source.repo_id) / "blobs" / file.digest
    if here.is_file() and here.stat().st_size == file.size_bytes:
        with here.open("rb") as blob:
            return blob.read(n_bytes)
    if not n_bytes:
        return b""
    data = _fetch_start(fetching, file, n_bytes)
    if len(data) < n_bytes:
        raise NetworkError(
            f"{fetching.source.request.host} sent {len(data):,} of the first {n_bytes:,} bytes of {file.name}",
            "try again",
        )
    return data


def _fetch_start(fetching: Fetching, file: RemoteFile, n_bytes: int) -> bytes:
    data = bytearray()
    try:
        with fetching.remote(file).open(0, n_bytes) as body:
            for piece in body.pieces():
                data += piece
                if len(data) >= n_bytes:  # of a server that knows no ranges, which sends all
                    break
    except TryAgainError as error:
        raise error.final from error.__cause__
    return bytes(data[:n_bytes])
