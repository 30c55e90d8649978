"""The captured step against the model that it stands for: interpreted on the CPU, captured where there is a GPU."""

from pathlib import Path

import pytest
import torch
from models import random_checkpoint

pytest.importorskip("triton")

from mistralcli.cache import KVCache
from mistralcli.decoder import Decoder, can_decode
from mistralcli.engine import Engine
from mistralcli.model import Transformer
from mistralcli.run_options import SamplingParams
from mistralcli.sampling import Sampler
from mistralcli.weights import load_model, open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.kernels import matmul
from quant.schemes.affine import Affine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "sliding_window": 6,
}
PROMPTS = [[5, 9, 77, 3, 30, 31, 8, 11, 12], [4, 60]]
SLACK = 3


@pytest.fixture(autouse=True)
def _weights_as_they_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the step reads; loaded for the CPU's kernels they would lie otherwise, and activations be rounded."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")


def checkpoint(tmp_path: Path, bits: int | None, **changes: object) -> Path:
    directory = tmp_path / "dense"
    random_checkpoint(directory, **(SIZES | changes))
    if bits is None:
        return directory
    scheme = Affine(bits, 32)
    quantize_checkpoint(
        open_checkpoint(directory), directory, tmp_path / "build", scheme, head_scheme=Affine(8)
    )
    return tmp_path / "build"


def load(directory: Path) -> Transformer:
    return load_model(directory, device=DEVICE, dtype=torch.float32)


def cache_of(model: Transformer, n_seqs: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(model.config, max_seq_len=64, n_seqs=n_seqs, slack=SLACK, dtype=dtype, device=DEVICE)


@torch.no_grad()
def prefill(model: Transformer, cache: KVCache) -> None:
    n_tokens = max(map(len, PROMPTS))
    ids = torch.tensor([prompt + [0] * (n_tokens - len(prompt)) for prompt in PROMPTS])
    positions = torch.arange(n_tokens).repeat(len(PROMPTS), 1)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    model(ids.to(DEVICE), positions.masked_fill(positions >= lengths[:, None], -1), cache)


@torch.no_grad()
def stepped(model: Transformer, cache: KVCache, ids: list[int]) -> torch.Tensor:
    positions = (cache.last + 1)[:, None].cpu()
    return model.logits(model(torch.tensor(ids, device=DEVICE)[:, None], positions, cache)[:, 0])


@pytest.mark.parametrize(
    ("bits", "changes", "bound"),
    [
        (None, {}, 1e-4),
        (None, {"tie_word_embeddings": True, "num_key_value_heads": 4, "sliding_window": None}, 1e-4),
        (8, {"num_key_value_heads": 1}, 4e-3),
        (4, {}, 4e-3),
    ],
)
def test_steps_give_the_logits_of_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int | None,
    changes: dict[str, object],
    bound: float,
) -> None:
    monkeypatch.setitem(
        matmul.ROUNDINGS, 4, "half"
    )  # so that the bound is that of a chain of float16 roundings
    directory = checkpoint(tmp_path, bits, **changes)
    model, expected_model = load(directory), load(directory)
    assert can_decode(model, 2)
    cache, expected_cache = cache_of(model, 2), cache_of(expected_model, 2)
    decoder = Decoder(model, cache)
    prefill(model, cache)
    prefill(expected_model, expected_cache)
    for ids in [[7, 80], [19, 3], [41, 41], [0, 95], [2, 17], [33, 64]]:
        logits, expected = decoder.feed(ids), stepped(expected_model, expected_cache, ids)
        assert (logits - expected).norm() / expected.norm() < bound
        assert torch.equal(cache.last, expected_cache.last)


@pytest.mark.parametrize("window", [6, None])
def test_steps_with_an_int8_cache_give_the_logits_of_the_model_with_one(
    tmp_path: Path, window: int | None
) -> None:
    """The kernel multiplies in bfloat16, which the interpreter cuts off: 2⁻⁷ for each product of two layers."""
    directory = checkpoint(tmp_path, None, sliding_window=window)
    model, expected_model = load(directory), load(directory)
    cache, expected_cache = cache_of(model, 2, torch.int8), cache_of(expected_model, 2, torch.int8)
    decoder = Decoder(model, cache)
    prefill(model, cache)
    prefill(expected_model, expected_cache)
    for ids in [[7, 80], [19, 3], [41, 41], [0, 95], [2, 17], [33, 64]]:
        logits, expected = decoder.feed(ids), stepped(expected_model, expected_cache, ids)
        assert (logits - expected).norm() / expected.norm() < 3e-2


def test_joined_matrices_are_the_model_s_own(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, 4))
    before = model.layers[0].attention.wk.qweight.clone()
    Decoder(model, cache_of(model, 1))
    attention = model.layers[0].attention
    assert torch.equal(attention.wk.qweight, before)
    stores = {
        linear.qweight.untyped_storage().data_ptr() for linear in (attention.wq, attention.wk, attention.wv)
    }
    assert len(stores) == 1


@pytest.mark.parametrize("changes", [{"head_dim": 24}, {"intermediate_size": 80}])
def test_sizes_that_the_kernels_do_not_know_are_left_to_the_model(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    assert not can_decode(load(checkpoint(tmp_path, None, **changes)), 1)


def test_a_chosen_id_is_what_the_next_step_reads(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, None)
    model, expected_model = load(directory), load(directory)
    cache, expected_cache = cache_of(model, 2), cache_of(expected_model, 2)
    decoder = Decoder(model, cache)
    prefill(model, cache)
    prefill(expected_model, expected_cache)
    expected, ids = [], [7, 80]
    for _ in range(5):
        ids = stepped(expected_model, expected_cache, ids).argmax(-1).tolist()
        expected.append(ids)
    decoder.feed([7, 80])
    chosen = [decoder.token_ids.tolist()]
    for _ in range(4):
        decoder.step()
        chosen.append(decoder.token_ids.tolist())
    assert chosen == expected


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: on the CPU the engine has no decoder")
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_engine_says_the_same_with_and_without_it(tmp_path: Path, bits: int | None) -> None:
    directory = checkpoint(tmp_path, bits)
    with_decoder, without = (
        Engine(load(directory), max_seq_len=64, chunk=4, slack=SLACK, device=DEVICE) for _ in "ab"
    )
    assert with_decoder.decoder is not None
    without.decoder = without._captured = None
    for prompt in (PROMPTS[0], PROMPTS[0][:7], [*PROMPTS[0], 4, 4]):
        for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, repeat_penalty=1.2)):
            said = [
                list(engine.generate(prompt, Sampler(params), max_tokens=20))
                for engine in (with_decoder, without)
            ]
            assert said[0][:4] == said[1][:4]
            assert len(said[0]) == 20
