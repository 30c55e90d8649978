"""Tiles dequantized ahead of the products that take them: interpreted on the CPU, on a stream of their own on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_checkpoint

pytest.importorskip("triton")

from mistralcli import prefill
from mistralcli.cache import KVCache
from mistralcli.prefill import CapturedForward
from mistralcli.weights import load_model, open_checkpoint
from quant import ops
from quant.checkpoint import quantize_checkpoint
from quant.kernels import ahead
from quant.kernels.ahead import Ahead
from quant.kernels.dequantize import dequantize
from quant.kernels.matmul import int4_matmul
from quant.kernels.matvec import Weight
from quant.schemes.affine import Affine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((64, 96), (32, 64), (160, 64), (32, 96))
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 64}
N_ROWS = 17
"""More than the kernels for few rows take."""


class Layer:
    """An int4 weight in groups of 32, and what it gives by the reference."""

    def __init__(self, generator: torch.Generator, out_features: int, in_features: int) -> None:
        codes = torch.randint(
            0, 256, (out_features, in_features // 2), generator=generator, dtype=torch.uint8
        )
        scales = torch.rand(out_features, in_features // 32, generator=generator)
        self.stored = codes.to(DEVICE), scales.to(DEVICE), None
        self.dense = ops.dequantize(*self.stored, in_features, 4)

    def error(self) -> float:
        """Of its product with random rows, in norm."""
        x = torch.randn(N_ROWS, self.dense.shape[1], device=DEVICE)
        expected = x @ self.dense.T
        return float((int4_matmul(x, *self.stored) - expected).norm() / expected.norm())


@pytest.fixture
def layers() -> list[Layer]:
    generator = torch.Generator().manual_seed(3)
    return [Layer(generator, *shape) for shape in SHAPES]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at most 64 rows of the third layer, which takes three."""
    monkeypatch.setattr(ahead, "TILE_BYTES", 64 * 64 * 4)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Each tile that is dequantized, by its weight's address and its first row."""
    calls: list[tuple[int, int]] = []

    def note(weight: Weight, start: int, out: torch.Tensor) -> None:
        calls.append((weight.words.data_ptr(), start))
        dequantize(weight, start, out)

    monkeypatch.setattr(ahead, "dequantize", note)
    return calls


def assert_right(layers: list[Layer]) -> None:
    for layer in layers:
        assert layer.error() < 1e-6


def test_every_pass_multiplies_right_and_dequantizes_each_tile_once(
    layers: list[Layer], written: list[tuple[int, int]]
) -> None:
    passes = Ahead(DEVICE)
    for _ in range(3):
        written.clear()
        with passes.during_pass():
            assert_right(layers)
        assert len(written) == len(set(written)) == 2 + 1 + 3 + 1


def test_a_tile_is_dequantized_before_the_product_before_it_is_asked_for(
    layers: list[Layer], written: list[tuple[int, int]]
) -> None:
    passes = Ahead(DEVICE)
    with passes.during_pass():
        assert_right(layers)
    written.clear()
    with passes.during_pass():
        for n_tiles, layer in zip((4, 5, 7, 7), layers, strict=True):
            assert layer.error() < 1e-6
            assert len(written) == n_tiles


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 2, 1, 3), (0, 0, 1), (3,), (0, 1), (0, 1, 2, 3, 0, 1)])
def test_passes_in_another_order_are_right_too(layers: list[Layer], order: tuple[int, ...]) -> None:
    passes = Ahead(DEVICE)
    for indices in ((0, 1, 2, 3), order, (0, 1, 2, 3)):
        with passes.during_pass():
            assert_right([layers[index] for index in indices])


def test_another_type_is_not_taken_for_the_one_that_was_learned(layers: list[Layer]) -> None:
    passes = Ahead(DEVICE)
    with passes.during_pass():
        assert_right(layers)
    with passes.during_pass():
        x = torch.randn(N_ROWS, 96, device=DEVICE, dtype=torch.bfloat16)
        found = int4_matmul(x, *layers[0].stored)
        expected = x.float() @ layers[0].dense.T
        assert (found.float() - expected).norm() < 2**-6 * expected.norm()


def test_a_pass_that_fails_while_it_is_learned_is_learned_again(
    layers: list[Layer], written: list[tuple[int, int]]
) -> None:
    passes = Ahead(DEVICE)
    with pytest.raises(RuntimeError, match="out of memory"), passes.during_pass():
        assert_right(layers[:2])
        raise RuntimeError("out of memory")
    for _ in range(2):
        with passes.during_pass():
            assert_right(layers)
    written.clear()
    with passes.during_pass():
        assert layers[0].error() < 1e-6
        assert len(written) == 4


def test_nothing_is_done_ahead_outside_of_a_pass(layers: list[Layer], written: list[tuple[int, int]]) -> None:
    passes = Ahead(DEVICE)
    with passes.during_pass():
        assert_right(layers)
    written.clear()
    assert layers[0].error() < 1e-6
    assert len(written) == 2


@pytest.mark.skipif(DEVICE.type != "cuda", reason="chunks are captured on a GPU only")
@torch.no_grad()
def test_captured_chunks_take_tiles_that_were_dequantized_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 64
    monkeypatch.setattr(prefill, "LARGE_CUDA_CHUNK", chunk)
    monkeypatch.setattr(ahead, "TILE_BYTES", 1 << 14)
    source, build = tmp_path / "source", tmp_path / "build"
    source.mkdir()
    random_checkpoint(source, num_hidden_layers=4, **SIZES)
    quantize_checkpoint(open_checkpoint(source), source, build, Affine(4, 32), head_scheme=Affine(8))
    model = load_model(build, device=DEVICE, dtype=torch.float32)
    caches = [KVCache(model.config, max_seq_len=1024, device=DEVICE) for _ in range(2)]
    captured = CapturedForward(model, caches[0], chunk)
    start = 0
    for n_tokens in (chunk, chunk, 40, chunk, 33, 40, 17, chunk, 40):
        positions = torch.arange(start, start + n_tokens)[None]
        ids = torch.randint(64, positions.shape)
        hidden = captured(ids, positions)
        torch.testing.assert_close(hidden, model(ids.to(DEVICE), positions, caches[1]), atol=2e-4, rtol=1e-4)
        start += n_tokens
