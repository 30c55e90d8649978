"""The writer of safetensors files, read back by the library."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.safetensors_file import SafetensorsWriter, file_size_bytes
from quant.tensors import TensorSpec


def _tensors(n_scales: int) -> dict[str, torch.Tensor]:
    return {
        "b.weight_shape": torch.tensor([4, 8]),
        "b.weight_packed": torch.arange(6, dtype=torch.int32),
        "a.weight": torch.randn(n_scales, dtype=torch.bfloat16),
        "b.weight_scale": torch.randn(2 * n_scales, dtype=torch.bfloat16),
        "c.weight": torch.randn(3),
    }


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Write them in the order in which they come; where the file says that each one lies."""
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert path.stat().st_size == file_size_bytes(specs)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("n_scales", [4, 3, 2])
def test_every_tensor_comes_back_and_is_aligned(n_scales: int, tmp_path: Path) -> None:
    tensors = _tensors(n_scales)
    places = _write(tmp_path / "file.safetensors", tensors)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert places[name][0] % tensor.dtype.itemsize == 0


def test_tensors_of_a_module_lie_together(tmp_path: Path) -> None:
    places = _write(tmp_path / "file.safetensors", _tensors(4))
    assert sorted(places, key=places.__getitem__) == sorted(places)


def test_wide_tensors_come_first_where_the_order_of_names_would_not_be_aligned(tmp_path: Path) -> None:
    places = _write(tmp_path / "file.safetensors", _tensors(3))
    assert sorted(places, key=places.__getitem__) == [
        "b.weight_shape",
        "b.weight_packed",
        "c.weight",
        "a.weight",
        "b.weight_scale",
    ]
