"""Schemes: what a command line may ask for, how codes are chosen, and that a layer gives back what was stored."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.errors import IntegrityError, MistralError, UsageError
from quant.methods.rtn import round_to_nearest
from quant.scheme import Scheme, default_head_scheme, parse_scheme
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8

CPU = torch.device("cpu")
SCHEMES: list[Scheme] = [
    *(
        Affine(bits, size, symmetric)
        for bits in (4, 8)
        for size in (32, 128, None)
        for symmetric in (True, False)
    ),
    Float4("nf4"),
    Float4("fp4"),
    LlmInt8(),
]


def by_name(scheme: Scheme) -> str:
    return scheme.name


def weight(out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(in_features)
    return (torch.randn((out_features, in_features), generator=generator) * 0.05).to(dtype)


def loaded(scheme: Scheme, w: torch.Tensor) -> torch.nn.Module:
    linear = scheme.linear(w.shape[1], w.shape[0])
    linear.load_stored(scheme.quantize(w, w.dtype), CPU)
    return linear


def relative_error(scheme: Scheme, w: torch.Tensor) -> float:
    dense = loaded(scheme, w).dense_rows(0, len(w))
    return float((dense - w.float()).norm() / w.float().norm())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "int4-g128"),
        ({"bits": 4}, "int4-g128"),
        ({"bits": 8}, "int8"),
        ({"scheme": "int8", "group_size": 128}, "int8-g128"),
        ({"group_size": 64, "symmetric": False}, "int4-g64-asym"),
        ({"group_size": 0}, "int4"),
        ({"bits": 8, "symmetric": False}, "int8-asym"),
        ({"scheme": "nf4"}, "nf4"),
        ({"bits": 8, "scheme": "llm.int8"}, "llm.int8"),
    ],
)
def test_a_command_line_names_a_scheme(arguments: dict[str, object], name: str) -> None:
    assert parse_scheme(**arguments).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 3},
        {"scheme": "int5"},
        {"scheme": ""},
        {"bits": 8, "scheme": "int4"},
        {"group_size": 48},
        {"group_size": -1},
        {"scheme": "nf4", "group_size": 64},
        {"scheme": "llm.int8", "symmetric": False},
    ],
)
def test_what_does_not_go_together_is_a_usage_error(arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        parse_scheme(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "in_features", "given"),
    [
        (128, 4096, 128),
        (128, 576, 64),
        (128, 96, 32),
        (64, 96, 32),
        (128, 80, None),
        (32, 48, None),
        (None, 64, None),
    ],
)
def test_a_group_size_that_does_not_divide_falls_back(
    asked: int | None, in_features: int, given: int | None
) -> None:
    for bits in (4, 8):
        assert Affine(bits, asked).for_in_features(in_features) == Affine(bits, given)


def test_an_untied_head_is_int8_beside_symmetric_layers_only() -> None:
    assert default_head_scheme(Affine(4, 128)) == default_head_scheme(Affine(8)) == Affine(8)
    assert default_head_scheme(Affine(4, 128, symmetric=False)) is None
    assert default_head_scheme(Float4()) is default_head_scheme(LlmInt8()) is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=by_name)
@pytest.mark.parametrize("shape", [(33, 256), (7, 384), (2, 1)])
def test_specs_are_those_of_what_is_stored_and_of_what_a_layer_asks_for(
    scheme: Scheme, shape: tuple[int, int]
) -> None:
    fitting = scheme.for_in_features(shape[1])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        specs = fitting.specs(*shape, dtype)
        made = fitting.quantize(weight(*shape, dtype), dtype)
        assert {key: (spec.shape, spec.dtype) for key, spec in specs.items()} == {
            key: (tuple(tensor.shape), tensor.dtype) for key, tensor in made.items()
        }
        asked = fitting.linear(shape[1], shape[0]).stored()
        assert asked.keys() == specs.keys()
        assert all(spec.shape == asked[key] or asked[key] == (-1,) for key, spec in specs.items())


@pytest.mark.parametrize("scheme", SCHEMES, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_its_dense_rows(scheme: Scheme, dtype: torch.dtype) -> None:
    linear = loaded(scheme, weight(48, 256, dtype))
    x = torch.randn((2, 5, 256), generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.inference_mode():
        y = linear(x)
    exact = x.double() @ linear.dense_rows(0, 48).double().T
    # bitsandbytes rounds nf4 weights to x's dtype and LLM.int8 inputs to 8 bits (0.4 % of a row's largest).
    tolerance = 0.02 if isinstance(scheme, LlmInt8) else 2e-6 if dtype == torch.float32 else 0.01
    assert y.dtype == dtype and y.shape == (2, 5, 48)
    assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES, ids=by_name)
@pytest.mark.parametrize("in_features", [256, 33])
def test_dense_rows_of_a_part_are_the_rows_of_the_whole(scheme: Scheme, in_features: int) -> None:
    linear = loaded(scheme.for_in_features(in_features), weight(20, in_features))
    whole = linear.dense_rows(0, 20)
    assert whole.shape == (20, in_features) and whole.dtype == torch.float32
    for start, stop in ((0, 1), (3, 11), (19, 20)):
        assert torch.equal(linear.dense_rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("scheme", SCHEMES, ids=by_name)
def test_the_error_on_normal_weights_is_far_below_the_gate(scheme: Scheme) -> None:
    assert 0 < relative_error(scheme, weight(64, 1024)) < scheme.max_error / 2.4


@pytest.mark.parametrize("symmetric", [True, False])
def test_smaller_groups_and_zero_points_lose_less(symmetric: bool) -> None:
    w = weight(64, 1024)
    errors = [relative_error(Affine(4, size, symmetric), w) for size in (32, 64, 128, None)]
    assert errors == sorted(errors)
    assert relative_error(Affine(4, 32, symmetric=False), w) < relative_error(Affine(4, 32), w)


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if isinstance(one, Affine)], ids=by_name)
def test_weights_that_are_on_a_grid_are_kept_exactly(scheme: Affine) -> None:
    low, high = -(1 << scheme.bits - 1), (1 << scheme.bits - 1) - 1
    codes = torch.randint(low, high + 1, (16, 8, 32), generator=torch.Generator().manual_seed(3))
    codes[..., 0], codes[..., 1] = low, high  # every group spans its range
    w = (codes.flatten(1) * 2.0**-9).to(torch.bfloat16)
    assert torch.equal(loaded(scheme, w).dense_rows(0, 16), w.float())
    assert torch.equal(loaded(scheme, -w).dense_rows(0, 16), -w.float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_searched_clip_is_never_worse_than_none(bits: int, symmetric: bool) -> None:
    torch.manual_seed(4)
    rows = torch.distributions.StudentT(3.0).sample((32, 256))  # type: ignore[no-untyped-call]
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    q_min, q_max = -(1 << bits - 1), (1 << bits - 1) - 1
    if symmetric:
        scale, zero = (torch.where(-low > high, low, high) / q_min).bfloat16().float(), torch.zeros(32, 1)
    else:
        scale = ((high.clamp(min=0) - low.clamp(max=0)) / (q_max - q_min)).bfloat16().float()
        zero = (q_min - low.clamp(max=0) / scale).round()
    plain = ((rows / scale + zero).round().clamp(q_min, q_max) - zero) * scale
    found = round_to_nearest(rows, bits=bits, group_size=256, symmetric=symmetric, scale_dtype=torch.bfloat16)
    zeros = 0 if found.zeros is None else found.zeros.float()
    ours = (found.codes.float() - zeros) * found.scales.float()
    assert ((ours - rows).norm(dim=1) <= (plain - rows).norm(dim=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("scheme", [Affine(4, 128), Affine(8)], ids=by_name)
def test_small_weights_lose_no_more_in_float16_than_in_bfloat16(scheme: Scheme) -> None:
    w = torch.randn((64, 1024), generator=torch.Generator().manual_seed(5)) * 1e-4
    in_half, in_bfloat16 = (relative_error(scheme, w.to(dtype)) for dtype in (torch.float16, torch.bfloat16))
    assert in_half < 1.1 * in_bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [one for one in SCHEMES if not isinstance(one, Float4)], ids=by_name)
def test_groups_of_zeros_and_of_tiny_values_stay_finite(scheme: Scheme, dtype: torch.dtype) -> None:
    w = torch.zeros((4, 256), dtype=dtype)
    w[1] = torch.finfo(dtype).tiny
    w[2, 7] = 1.0
    dense = loaded(scheme, w).dense_rows(0, 4)
    assert dense.isfinite().all()
    assert (dense[0] == 0).all()
    assert dense[2, 7] == pytest.approx(1.0, rel=0.1)
    assert (dense[2, 8:] == 0).all()


def test_affine_layers_keep_the_stored_bytes_without_a_copy() -> None:
    stored = Affine(4, 32).quantize(weight(16, 256), torch.bfloat16)
    linear = Affine(4, 32).linear(256, 16)
    linear.load_stored(stored, CPU)
    assert linear.qweight.data_ptr() == stored["weight_packed"].data_ptr()


def damaged(scheme: Scheme, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return scheme.quantize(weight(16, 256), torch.bfloat16) | changes


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        (Affine(4, 32), {"weight_shape": torch.tensor([256, 16])}, r"weight_shape is \[256, 16\]"),
        (
            Affine(4, 32),
            {"weight_packed": torch.zeros((16, 32), dtype=torch.int64)},
            "weight_packed is .*int64",
        ),
        (
            Affine(8, None, False),
            {"weight_zero_point": torch.zeros((4, 1))},
            "weight_zero_point is .*float32",
        ),
        (LlmInt8(), {"weight_format": torch.tensor(1, dtype=torch.uint8)}, "format 1"),
        (LlmInt8(), {"weight": torch.zeros((16, 256), dtype=torch.uint8)}, "uint8"),
        (Float4(), {"weight.quant_map": torch.linspace(-1, 1, 16)}, "quant_map is not that of nf4"),
        *(
            (Float4(), {Float4().state_suffix: torch.tensor(list(text), dtype=torch.uint8)}, "quant_state")
            for text in (
                b"",
                b"\xff",
                b"[]",
                b"{}",
                b'{"quant_type": "nf4", "blocksize": 128, "shape": [16, 256]}',
            )
        ),
    ],
)
def test_stored_tensors_that_contradict_the_layer_are_refused(
    scheme: Scheme, changes: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(IntegrityError, match=message):
        scheme.linear(256, 16).load_stored(damaged(scheme, **changes), CPU)


def test_groups_that_do_not_divide_a_layer_are_refused() -> None:
    with pytest.raises(IntegrityError, match="128 weights do not divide 96"):
        Affine(4, 128).linear(96, 8)


@pytest.mark.parametrize(("bits", "group_size"), [(3, None), (2, 32), (4, 33), (4, 0), (8, -1)])
def test_impossible_affine_schemes_are_refused(bits: int, group_size: int | None) -> None:
    with pytest.raises(MistralError, match=f"{bits}.bit|groups of {group_size}"):
        Affine(bits, group_size)


@pytest.mark.parametrize(
    ("scheme", "directory"), [(Float4("nf4"), "bnb_nf4"), (Float4("fp4"), "bnb_fp4"), (LlmInt8(), "bnb_int8")]
)
def test_bitsandbytes_schemes_store_the_bytes_that_transformers_stores(
    scheme: Scheme, directory: str, shared_dir: Path
) -> None:
    interop = shared_dir / "data" / "interop"
    dense = load_file(interop / "base_bf16" / "model.safetensors")
    theirs = load_file(interop / directory / "model.safetensors")
    for name, tensor in dense.items():
        if name.endswith("_proj.weight"):
            for suffix, stored in scheme.quantize(tensor, torch.bfloat16).items():
                assert torch.equal(stored, theirs[f"{name.removesuffix('weight')}{suffix}"]), (name, suffix)


def test_bitsandbytes_is_imported_only_by_its_own_schemes() -> None:
    code = (
        "import sys, json, torch; from quant.scheme import *; import quant.checkpoint; s = parse_scheme();"
        "l = s.linear(128, 8); l.load_stored(s.quantize(torch.ones(8, 128), torch.float32), torch.device('cpu'));"
        "l(torch.ones(1, 128)); print(json.dumps('bitsandbytes' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


def test_bitsandbytes_says_nothing_on_stderr() -> None:
    code = (
        "import torch; from quant.scheme import *; s = parse_scheme(scheme='llm.int8');"
        "l = s.linear(128, 8); l.load_stored(s.quantize(torch.ones(8, 128), torch.float32), torch.device('cpu'));"
        "l(torch.ones(1, 128))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
