"""Tensors read through staging buffers are those of the file, whatever the buffers' sizes; a damaged file is named.

Here the device is the CPU and the buffers are pageable; on a GPU the same code has pinned ones.
"""

import mmap
import os
import random
import threading
from collections.abc import Collection
from contextlib import nullcontext
from errno import ENOMEM
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, random_checkpoint
from safetensors.torch import load_file, save_file
from test_quant_checkpoint import SHAPE, build
from test_weights import as_mistral_layout

from mistralcli import staged_reading, weights
from mistralcli.errors import IntegrityError
from mistralcli.model import Transformer
from mistralcli.staged_reading import Staging, TensorPlace, data_offsets
from mistralcli.weights import load_model
from quant.linear import QuantizedLinear
from quant.scheme import Scheme
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8
from quant.tensors import TensorSpec

CPU = torch.device("cpu")


def read_all(places: list[TensorPlace], kept: Collection[str] = (), **sizes: int) -> list[torch.Tensor]:
    with Staging(places, CPU, **sizes) as staging:
        return list(staging.tensors(kept))


def places(path: Path) -> list[TensorPlace]:
    offsets = data_offsets(path)
    return [
        TensorPlace(name, path, offsets[name], TensorSpec(tuple(tensor.shape), tensor.dtype))
        for name, tensor in load_file(path).items()
    ]


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of many types and sizes: empty, a scalar, odd lengths."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "odd": torch.randint(0, 256, (1_023,), generator=generator, dtype=torch.uint8),
        "words": torch.randint(-(2**31), 2**31 - 1, (37, 5), generator=generator, dtype=torch.int32),
        "dense": torch.randn(33, 17, generator=generator).bfloat16(),
        "wide": torch.randn(3, 2, generator=generator, dtype=torch.float64),
    }
    path = tmp_path_factory.mktemp("mixed") / "mixed.safetensors"
    save_file(tensors, path)
    return path


@settings(max_examples=40, deadline=None)
@given(
    n_buffers=st.integers(1, 5),
    buffer_bytes=st.integers(16, 3_000),
    order=st.randoms(),
    kept=st.sets(st.sampled_from(["empty", "scalar", "odd", "words", "dense", "wide"])),
)
def test_any_number_and_size_of_buffers_gives_the_files_tensors_in_any_order(
    mixed_file: Path, n_buffers: int, buffer_bytes: int, order: random.Random, kept: set[str]
) -> None:
    wanted = places(mixed_file) * 2
    order.shuffle(wanted)
    expected = load_file(mixed_file)
    found = read_all(wanted, kept, n_buffers=n_buffers, buffer_bytes=buffer_bytes)
    for place, tensor in zip(wanted, found, strict=True):
        assert tensor.dtype == expected[place.name].dtype
        assert torch.equal(tensor, expected[place.name]), place.name


def test_tensors_that_are_kept_share_memory_and_begin_at_a_line(tmp_path: Path) -> None:
    sizes = {"a": 256, "b": 512, "c": 200, "d": 128, "e": 128}
    path = tmp_path / "some.safetensors"
    save_file({name: torch.full((size,), ord(name), dtype=torch.uint8) for name, size in sizes.items()}, path)
    wanted = sorted(places(path), key=lambda place: place.start)
    assert [place.name for place in wanted] == list("abcde")

    def shares(kept: str) -> list[int]:
        tensors = read_all(wanted, set(kept), buffer_bytes=300)
        assert [tensor.unique().tolist() for tensor in tensors] == [[ord(name)] for name in "abcde"]
        assert all(tensor.storage_offset() % 128 == 0 for tensor in tensors)
        found = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        return [found.index(one) for one in found]

    assert shares("") == [0, 1, 2, 3, 4]
    assert shares("abcde") == [0, 0, 0, 0, 0]
    assert shares("acde") == [0, 1, 2, 2, 2]


def test_tensors_that_share_memory_are_no_more_than_a_slab(
    mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_reading, "SLAB_BYTES", 400)
    wanted = [TensorPlace(str(i), mixed_file, 100 * i, TensorSpec((100,), torch.uint8)) for i in range(8)]
    tensors = read_all(wanted, {place.name for place in wanted})
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [228] * 8
    content = mixed_file.read_bytes()
    for i, tensor in enumerate(tensors):
        assert bytes(tensor.numpy()) == content[100 * i : 100 * i + 100]


def test_a_file_that_shrinks_after_its_header_was_read_is_named_with_the_tensor(
    mixed_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(mixed_file.read_bytes())
    wanted = places(path)
    last = max(wanted, key=lambda place: place.start + place.spec.nbytes)
    os.truncate(path, last.start + last.spec.nbytes - 1)
    with pytest.raises(IntegrityError, match=rf"short\.safetensors .* tensor {last.name}: it ends at byte"):
        read_all(wanted)


def test_a_file_that_vanishes_is_named(mixed_file: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    wanted = [TensorPlace("odd", gone, 0, TensorSpec((4,), torch.uint8))]
    with pytest.raises(IntegrityError, match=r"gone\.safetensors cannot be read for tensor odd"):
        read_all(wanted)


def test_closing_it_early_ends_its_threads(mixed_file: Path) -> None:
    with Staging(places(mixed_file) * 50, CPU, n_buffers=2, buffer_bytes=64) as staging:
        next(staging.tensors())
    assert not readers()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read weights")]


def test_where_a_thread_cannot_be_started_the_others_end(
    mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def third_fails(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", third_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Staging(places(mixed_file) * 50, CPU, buffer_bytes=64)
    assert len(started) == 3 and not readers()


def test_an_error_of_the_device_at_the_end_leaves_no_thread(
    mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with (
        pytest.raises(RuntimeError, match="device-side assert"),
        Staging(places(mixed_file) * 50, CPU, n_buffers=3, buffer_bytes=64) as staging,
    ):
        next(staging.tensors())
        monkeypatch.setattr(staged_reading._Buffer, "release", fails)
    assert not readers()


@pytest.mark.parametrize(("status", "is_pinned"), [(0, True), (2, False)])
def test_where_no_memory_can_be_pinned_it_is_read_all_the_same(
    status: int, is_pinned: bool, mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose runtime is one that pins nothing but says what it was asked for."""
    asked: list[str] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: asked.append("pin") or status,
        cudaHostUnregister=lambda _: asked.append("unpin"),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(synchronize=lambda: None))
    (place,) = (one for one in places(mixed_file) if one.name == "odd")
    buffer = staged_reading._Buffer(4096, torch.device("cuda"))
    with mixed_file.open("rb") as file:
        buffer.fill(staged_reading._Piece(mixed_file, place.start, place.stop), file.fileno())
    found = torch.empty(place.spec.nbytes, dtype=torch.uint8)
    buffer.copy_to(found, 0, place.spec.nbytes)
    buffer.close()
    assert torch.equal(found, load_file(mixed_file)["odd"])
    assert asked == (["pin", "unpin"] if is_pinned else ["pin"])


def staged_model(directory: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Transformer:
    """The model as a GPU would get it, on the CPU."""
    monkeypatch.setattr(weights, "_mapping", weights._staging)
    return load_model(directory, device=CPU, dtype=dtype)


def state(model: Transformer) -> dict[str, torch.Tensor]:
    """All weights, the quantized ones as they compute."""
    quantized = {
        name: module.dense_rows(0, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    return dict(model.named_parameters()) | quantized


def assert_same_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = state(load_model(directory, device=CPU, dtype=torch.float32))
    staged = state(staged_model(directory, monkeypatch, torch.float32))
    assert mapped.keys() == staged.keys() and len(mapped) > 3 * SMALL["num_hidden_layers"]
    for name, tensor in mapped.items():
        assert tensor.dtype == staged[name].dtype and torch.equal(tensor, staged[name]), name


def test_a_dense_model_is_the_same_mapped_and_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path / "hf", dtype="bfloat16")
    as_mistral_layout(tmp_path / "hf", tmp_path / "own")
    assert_same_model(tmp_path / "hf", monkeypatch)
    assert_same_model(tmp_path / "own", monkeypatch)


@pytest.mark.parametrize(
    "scheme",
    [Affine(4, 32), Affine(4, 64, False), Affine(8), Float4(), LlmInt8()],
    ids=lambda scheme: scheme.name,
)
def test_a_build_is_the_same_mapped_and_staged(
    scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path / "source", dtype="bfloat16", **SHAPE)
    build(tmp_path / "source", tmp_path / "build", scheme)
    assert_same_model(tmp_path / "build", monkeypatch)


def test_where_there_is_no_memory_for_a_buffer_the_reader_says_so(
    mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int, **__: int) -> None:
        raise OSError(ENOMEM, os.strerror(ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="no memory for a buffer of 4096 bytes"):
        read_all(places(mixed_file), buffer_bytes=4096)
