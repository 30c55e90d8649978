"""Writing safetensors files one tensor at a time, so that they never are in memory as a whole.

The safetensors library writes a dictionary of tensors at once. The format is simple: an 8-byte little-endian
length, a JSON header of that length with name, dtype, shape and place of each tensor, then the data without gaps.
"""

import json
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from quant.tensors import TensorSpec

_ALIGNMENT = 8
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_size_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """The exact size of a file with these tensors."""
    return len(_header(_offsets(specs), specs)) + sum(spec.nbytes for spec in specs.values())


class SafetensorsWriter:
    """A file whose tensors are written in any order; a context manager, to close it.

    written: names of tensors that the file has already, from an earlier process. Without any it is made anew.

    Raises:
        OSError: it cannot be written, or is not there where it should have tensors.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], written: Collection[str] = ()) -> None:
        self._specs = dict(specs)
        self._offsets = _offsets(specs)
        self._missing = set(specs).difference(written)
        header = _header(self._offsets, specs)
        self._data_start = len(header)
        self._file = path.open("r+b" if written else "wb")
        self._file.write(header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, which has the shape and dtype that were announced."""
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
        assert spec == self._specs[name], f"{name}: {spec} is not the announced {self._specs[name]}"
        self._file.seek(self._data_start + self._offsets[name])
        self._file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def sync(self) -> None:
        """Have on the disk what was written until now."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        assert error is not None or not self._missing, f"never written: {sorted(self._missing)}"


def _offsets(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor's data begin, in the order of names, so that what a module needs lies together.

    Where that would leave a tensor that is not aligned to its own width, as an odd number of scales does, wide dtypes
    come first, since the format has no gaps.
    """
    by_name = _laid_out(sorted(specs), specs)
    if all(start % specs[name].dtype.itemsize == 0 for name, start in by_name.items()):
        return by_name
    return _laid_out(sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)), specs)


def _laid_out(names: Iterable[str], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor's data begin when they lie one behind the other in that order."""
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += specs[name].nbytes
    return offsets


def _header(offsets: Mapping[str, int], specs: Mapping[str, TensorSpec]) -> bytes:
    """Length and JSON, filled with spaces so that the data are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, start in offsets.items():
        spec = specs[name]
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
