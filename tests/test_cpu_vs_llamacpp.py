"""The small parts of `benchmarks/cpu_vs_llamacpp.py`: what it writes for llama.cpp, its patch, workers and rows."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

gguf = pytest.importorskip("gguf")
sys.path.append(str(REPOSITORY / "benchmarks"))

import cpu_llama_build  # noqa: E402
import cpu_vs_llamacpp  # noqa: E402
import gguf_build  # noqa: E402
import peer_rows  # noqa: E402
import worker_protocol  # noqa: E402
from random_build import write_build_of  # noqa: E402
from shapes import MISTRAL_1B  # noqa: E402

from mistralcli.errors import MistralError  # noqa: E402
from mistralcli.ops import apply_rotary, rotary_tables  # noqa: E402
from quant.ops import dequantize  # noqa: E402
from quant.schemes.affine import Affine  # noqa: E402

SMALL = cpu_vs_llamacpp.replace(
    MISTRAL_1B, dim=128, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=256, vocab_size=4096
)


def test_rows_of_queries_and_keys_are_in_the_order_of_the_pairs_that_llama_cpp_rotates() -> None:
    n_heads, head_dim, theta = 3, 8, 10_000.0
    x = torch.randn((1, 5, n_heads, head_dim), generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(torch.arange(5)[None], head_dim, theta)
    order = gguf_build.rotary_rows(n_heads, head_dim)
    theirs = x.flatten(2)[..., order].unflatten(2, (n_heads, head_dim // 2, 2))  # pairs (2i, 2i + 1)
    turned = torch.view_as_complex(theirs) * torch.complex(cos, sin)[:, :, None]
    ours = apply_rotary(x, cos, sin).flatten(2)[..., order]
    torch.testing.assert_close(torch.view_as_real(turned).flatten(2), ours)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_a_gguf_file_has_the_weights_of_the_build(bits: int, group_size: int, tmp_path: Path) -> None:
    scheme = Affine(bits, group_size)
    write_build_of(SMALL, tmp_path, scheme, Affine(8, 32))
    gguf_build.write_gguf(tmp_path, tmp_path / "model.gguf")
    found = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == 9 + 3
    checkpoint = gguf_build.open_checkpoint(tmp_path)
    for theirs, ours, n_heads, n_bits in (
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj", 4, bits),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", 2, bits),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", None, bits),
        ("output", "lm_head", None, 8),
    ):
        tensor = found[f"{theirs}.weight"]
        got = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        packed, scales = (checkpoint.load(f"{ours}.weight_{what}") for what in ("packed", "scale"))
        want = dequantize(
            packed.view(torch.uint8),
            scales.half(),
            None,
            int(checkpoint.load(f"{ours}.weight_shape")[1]),
            n_bits,
        )
        assert torch.equal(got, want if n_heads is None else want[gguf_build.rotary_rows(n_heads, 32)])


def test_what_llama_cpp_has_no_type_for_is_refused_by_name(tmp_path: Path) -> None:
    write_build_of(SMALL, tmp_path / "narrow", Affine(4, 16), Affine(8, 32))
    with pytest.raises(MistralError, match=r"layers\.0\.self_attn\.q_proj has 8 groups"):
        gguf_build.write_gguf(tmp_path / "narrow", tmp_path / "model.gguf")


def test_the_patched_kernel_prefetches_in_its_own_loop_alone() -> None:
    other = "static void other() {\n  for (int64_t b = 0; b < nb; b++) {\n"
    source = other + cpu_llama_build._FUNCTION + "() {\n  for (int64_t b = 0; b < nb; b++) {\n    load();\n"
    patched = cpu_llama_build.with_prefetch(source)
    assert patched.startswith(other + cpu_llama_build._FUNCTION)
    assert patched.count("_mm_prefetch") == 1 and patched.endswith(
        cpu_llama_build._PREFETCH + "    load();\n"
    )


WORKER = """
from worker_protocol import serve, timed
def ids(n):
    print("chatter")
    return timed(iter(range(n)))
serve({"ids": ids, "fail": lambda: 1 / 0})
"""


def test_a_worker_answers_and_its_end_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_protocol, "SETTLE_S", 0.0)
    env = {"PYTHONPATH": str(REPOSITORY / "benchmarks")}
    with worker_protocol.Worker([sys.executable, "-c", WORKER], env) as worker:
        load = worker_protocol.Load(worker)
        answer = worker.ask("ids", n=3)
        assert answer["ids"] == [0, 1, 2] and answer["seconds"] == sorted(answer["seconds"])
        assert worker.processor_s > 0 and 0 <= load.others_share() <= 1
        with pytest.raises(SystemExit, match=r"asked to fail(.|\n)*ZeroDivisionError"):
            worker.ask("fail")


def test_a_row_has_medians_and_the_median_of_the_ratios_within_rounds() -> None:
    rounds = [{"ours": 4.0, "peer": 1.0}, {"ours": 9.0, "peer": 3.0}, {"ours": 5.0, "peer": 2.5}]
    bar = peer_rows.Bar("ours", "peer", 3.5)
    row = peer_rows.row_of("decode", "tok/s", rounds, [bar], others=0.25)
    assert row.figures == {"ours": 5.0, "peer": 2.5} and row.ratios == [(bar, 3.0)]
    assert str(row).endswith("3.00 of peer (MISSES 3.5) | others took 25%")
    assert cpu_vs_llamacpp.as_json(row)["ratios"] == [
        {"ours": "ours", "peer": "peer", "at_least": 3.5, "ratio": 3.0}
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "1b,9b"], "9b is not one of 1b, 7b"),
        (["--rounds", "0"], "must be at least 1"),
        (["--llama-python", "/nowhere/python"], "/nowhere/python does not exist"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cpu_vs_llamacpp.parsed(["--work", "w", *arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err
