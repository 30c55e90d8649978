"""Sampling on the device against `mistralcli.sampling`: compiled on a GPU, interpreted without one.

Run as a program, this file compiles the kernels for GPUs that need not be here and prints what they spill.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mistralcli.run_options import SamplingParams
from mistralcli.sampling import penalize, truncate

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mistralcli.kernels import sample  # noqa: E402
from mistralcli.kernels.sample import DeviceSampler  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not triton.knobs.runtime.interpret,
        reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported",
    ),
    # The interpreter of triton 3.6 makes loop bounds of arrays with one element.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    # NaN and infinities are meant where the interpreter's numpy warns of them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SIZES = [1, 50, 1000, 5000]  # less than a chunk, and several chunks and blocks with a tail


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws(sampler: DeviceSampler, logits: torch.Tensor, n: int = 1) -> list[list[int]]:
    """The ids of n draws, each (n_seqs,)."""
    ids = torch.empty(len(logits), dtype=torch.int64, device=DEVICE)
    out = []
    for _ in range(n):
        sampler.sample(logits.to(DEVICE), ids)
        out.append(ids.tolist())
    return out


def draw(
    logits: torch.Tensor, params: SamplingParams, seed: int = 0, seen: list[list[int]] | None = None
) -> tuple[list[int], DeviceSampler]:
    sampler = DeviceSampler(*logits.shape, DEVICE)
    sampler.set(params, seed, seen)
    return draws(sampler, logits)[0], sampler


@pytest.mark.parametrize("vocab_size", SIZES)
def test_temperature_zero_takes_the_likeliest_and_of_equal_ones_the_first(vocab_size: int) -> None:
    logits = randn(3, vocab_size)
    logits[1] = 0.25
    logits[2] = logits[2].round()  # equal maxima, in several chunks
    assert draw(logits, SamplingParams(temperature=0))[0] == logits.argmax(1).tolist()


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_penalty_is_that_of_the_reference(vocab_size: int) -> None:
    logits = randn(3, vocab_size) - torch.tensor([[0.0], [9.0], [0.0]])  # the second has no positive ones
    seen = [
        logits[0].topk(min(5, vocab_size)).indices.tolist() * 2,
        logits[1].argmax(0, keepdim=True).tolist(),
        [],
    ]
    expected = [int(penalize(row, ids, 1.5).argmax()) for row, ids in zip(logits, seen, strict=True)]
    assert draw(logits, SamplingParams(temperature=0, repeat_penalty=1.5), seen=seen)[0] == expected


def test_what_was_drawn_is_seen_from_then_on() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.5, -1.0]])
    sampler = DeviceSampler(1, 4, DEVICE)
    sampler.set(SamplingParams(temperature=0, repeat_penalty=2), 0, [[3]])
    # 4 → 2, then 3 → 1.5, then 2.5 → 1.25: the first is the greatest again.
    assert draws(sampler, logits, 4) == [[0], [1], [2], [0]]
    assert sampler.seen.tolist() == [[1, 1, 1, 1]]
    sampler.set(SamplingParams(temperature=0, repeat_penalty=2), 0, None)
    assert sampler.seen.tolist() == [[0, 0, 0, 0]]


CASES = {
    "top-k": {"top_k": 7},
    "one": {"top_k": 1},
    "top-k of more than are near": {"top_k": 40, "temperature": 0.1},
    "top-k of all": {"top_k": 1000},
    "top-p": {"top_p": 0.9},
    "top-p of nearly nothing": {"top_p": 1e-6},
    "top-p of nearly all": {"top_p": 0.9999, "temperature": 0.4},
    "top-p of a flat distribution": {"top_p": 0.5, "temperature": 100.0},
    "min-p": {"min_p": 0.05},
    "min-p beyond what is near": {"min_p": 1e-6},
    "min-p of one": {"min_p": 1.0},
    "top-p after top-k": {"top_k": 10, "top_p": 0.7},
    "top-p and min-p": {"top_p": 0.95, "min_p": 0.1},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repeat_penalty": 1.3},
}


@pytest.mark.parametrize("case", CASES)
def test_truncation_keeps_what_the_reference_keeps(case: str) -> None:
    check_truncation(randn(1, 1000) * 3, SamplingParams(**{"temperature": 1.0, **CASES[case]}))


@pytest.mark.parametrize("seed", range(16))
def test_truncation_keeps_what_the_reference_keeps_whatever_the_parameters(seed: int) -> None:
    rng = random.Random(seed)
    vocab_size = rng.choice([2, 50, 1000, 5000])
    logits = randn(1, vocab_size, seed=seed) * rng.choice([0.1, 2, 8]) + rng.choice([-30, 0, 0, 10])
    if rng.random() < 0.3:
        logits = logits.round()  # equal ones at every bound
    if rng.random() < 0.3:
        logits[:, ::3] = -math.inf
    params = SamplingParams(
        temperature=rng.choice([0.1, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, rng.randint(1, 60)]),
        top_p=rng.choice([1, rng.uniform(0.01, 0.999)]),
        min_p=rng.choice([0, 0, rng.uniform(1e-6, 1)]),
        repeat_penalty=rng.choice([1, rng.uniform(0.8, 1.5)]),
    )
    check_truncation(logits, params)


def truncated(scaled: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """−∞ where `truncate` leaves a token out; the largest of `scaled` is 0."""
    left_out = torch.from_numpy(truncate(scaled.exp().numpy(), params) == 0)
    return scaled.masked_fill(left_out, -math.inf)


def check_truncation(logits: torch.Tensor, params: SamplingParams) -> None:
    """The sampler keeps `truncate`'s tokens, and draws of them what it would draw of all if that is kept."""
    seen = [[i for i in (1, 5, 40) if i < logits.shape[1]]]
    adjusted = penalize(logits[0].double(), seen[0], params.repeat_penalty)
    scaled = (adjusted - adjusted.max()) / params.temperature
    expected = truncated(scaled, params).isfinite()
    # What is equal to a token that is kept is kept as well.
    expected = (scaled >= scaled[expected].min()) & scaled.isfinite()

    (token_id,), sampler = draw(logits, params, seed=3, seen=seen)
    least = float(sampler.least[0])
    is_computed = params.repeat_penalty != 1 or params.min_p > 0  # else it is one of the logits
    rounding = 1e-6 * max(1.0, abs(least)) if is_computed else 0
    kept = (adjusted >= least - rounding) & scaled.isfinite()
    assert not (kept != expected)[~at_a_bound(scaled, params)].any(), (params, kept.sum(), expected.sum())
    assert kept[token_id]

    free = SamplingParams(temperature=params.temperature, repeat_penalty=params.repeat_penalty)
    (untruncated,), _ = draw(logits, free, seed=3, seen=seen)
    assert untruncated == token_id or not kept[untruncated]


def at_a_bound(scaled: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Tokens that float32 may put on the other side: they, or the mass before them, are within 1e-5 of a bound."""
    at_min_p = (scaled - math.log(params.min_p or 1e-300)).abs() < 1e-5
    if params.top_p == 1:
        return at_min_p
    among = truncated(scaled, SamplingParams(temperature=1, top_k=params.top_k))
    ordered = among.sort(descending=True).values
    up_to = torch.cat([torch.zeros(1), ordered.softmax(-1).cumsum(-1)])
    before = up_to[torch.searchsorted(-ordered, -scaled)]  # the mass of those strictly likelier
    return at_min_p | ((before - params.top_p).abs() < 1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.99, 0.9999])
def test_top_p_counts_the_many_tokens_that_are_far_from_the_likeliest(top_p: float) -> None:
    logits = randn(1, 1000) * 0.1
    logits[0, 17] = 12  # e¹² is 99.4 % of the mass, and no other token is near
    check_truncation(logits, SamplingParams(temperature=1, top_p=top_p))


def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.tensor([[1.0, 0.0, -0.0, -0.0]])
    _, sampler = draw(logits, SamplingParams(temperature=1, top_k=2, top_p=0.7))
    # Top-k leaves all, of which the first has e / (e + 3) = 0.48; of two only it would have 0.73.
    assert sampler.least.tolist() == [0.0]


@triton.jit
def gumbel_kernel(out, seed, n_draw, N: tl.constexpr):
    draw = tl.program_id(0)
    ids = tl.arange(0, N)
    noise = sample._gumbel(seed, ids, tl.load(n_draw) + draw)
    tl.store(out + draw * N + ids, noise)


def test_the_noise_has_the_gumbel_distribution() -> None:
    n = 16384
    noise = torch.empty(4, n, device=DEVICE)
    gumbel_kernel[(4,)](noise, 2**62 + 1, torch.tensor([2], dtype=torch.int32, device=DEVICE), N=n)
    assert noise.isfinite().all()
    below = torch.exp(-torch.exp(-noise.double().flatten().cpu().sort().values))  # the distribution function
    steps = torch.arange(1, 4 * n + 1) / (4 * n)
    # Kolmogorov and Smirnov: one seed in a thousand exceeds it.
    assert float((below - steps).abs().max()) < 1.95 / math.sqrt(4 * n)
    # Of the greatest, which let rare tokens win, 65 are expected above −log(1e-3).
    assert 35 < int((noise > -math.log(1e-3)).sum()) < 100


@pytest.mark.parametrize("params", [{}, {"min_p": 0.1}], ids=["all", "truncated"])
def test_draws_follow_the_distribution(params: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # the interpreter is faster with small ones
        monkeypatch.setattr(sample, "CHUNK", 8)
        monkeypatch.setattr(sample, "BLOCK", 8)
    p = torch.tensor([0.3, 0.02, 0.25, 0.13, 0.1, 0.02, 0.14, 0.04])
    n_seqs = 128 if params else 256
    sampler = DeviceSampler(n_seqs, 8, DEVICE)
    for index in range(n_seqs):
        sampler.set_sequence(index, SamplingParams(temperature=0.5, **params), 11 + index, [])
    ids = torch.tensor(draws(sampler, (p.log() * 0.5).expand(n_seqs, 8).contiguous())).flatten()
    kept = p >= p.max() * params.get("min_p", 0)
    expected = p.where(kept, 0) / p[kept].sum() * len(ids)
    counts = torch.bincount(ids, minlength=8)
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - expected) ** 2 / expected)[kept].sum())
    assert chi_square < 24.3  # with 7 degrees of freedom one seed in a thousand exceeds it


@pytest.mark.skipif(DEVICE == "cpu", reason="too many draws for the interpreter")
def test_rare_tokens_are_as_rare_as_they_should_be() -> None:
    """Tokens of 1e-6 each, a tenth of the mass together, in many draws: their noise must be fine where it is large."""
    logits = torch.full((1024, 100_001), math.log(1e-6))
    logits[:, 0] = math.log(0.9)
    sampler = DeviceSampler(1024, 100_001, DEVICE)
    for index in range(1024):
        sampler.set_sequence(index, SamplingParams(temperature=1), 1 + index, [])
    ids = torch.tensor(draws(sampler, logits, 40))
    share = float((ids > 0).float().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / ids.numel())
    assert len(ids[ids > 0].unique()) > 0.95 * (ids > 0).sum()


def test_a_seed_repeats_the_ids_in_every_sequence_and_another_seed_does_not() -> None:
    logits = torch.zeros(2, 1000)
    sampler = DeviceSampler(2, 1000, DEVICE)
    drawn = {}
    for seed in (7, 8, 7 + 2**40):
        for _ in range(2):
            sampler.set(SamplingParams(temperature=1), seed, None)
            ids = draws(sampler, logits, 10)
            assert drawn.setdefault(seed, ids) == ids
    assert drawn[7] != drawn[8] and drawn[7] != drawn[7 + 2**40]
    first, second = zip(*drawn[7], strict=True)
    assert first == second and len(set(first)) > 5


PARAMETERS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "repeat_penalty": 1.4},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0, "repeat_penalty": 3.0},
]
"""Of sequences that are decoded together."""


def test_each_sequence_has_its_own_parameters_and_draws_what_it_draws_alone_in_any_row() -> None:
    logits = randn(len(PARAMETERS), 1500) * 2
    seen = [row.topk(3).indices.tolist() for row in logits]
    alone = []
    for i, parameters in enumerate(PARAMETERS):
        one = DeviceSampler(1, 1500, DEVICE)
        one.set(SamplingParams(**parameters), 2**40 + i, [seen[i]])
        alone.append([ids[0] for ids in draws(one, logits[i : i + 1], 3)])
    assert alone[0] == [int(logits[0].argmax())] * 3
    assert alone[5][0] == int(penalize(logits[5], seen[5], 3.0).argmax())
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 1, 4, 0, 2]):
        together = DeviceSampler(len(PARAMETERS), 1500, DEVICE)
        for row, i in enumerate(order):
            together.set_sequence(row, SamplingParams(**PARAMETERS[i]), 2**40 + i, seen[i])
        columns = zip(*draws(together, logits[order], 3), strict=True)
        assert [list(column) for column in columns] == [alone[i] for i in order]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.7}], ids=["all", "truncated"])
def test_a_sequence_that_begins_anew_leaves_the_others_where_they_are(params: dict[str, float]) -> None:
    logits = randn(3, 1100)
    drawing = SamplingParams(temperature=1.5, repeat_penalty=1.5, **params)
    undisturbed, sampler = (DeviceSampler(3, 1100, DEVICE) for _ in "ab")
    for one in (undisturbed, sampler):
        for index in range(3):
            one.set_sequence(index, drawing, index, [index])
    expected = draws(undisturbed, logits, 4)
    assert draws(sampler, logits, 2) == expected[:2]
    ids = torch.tensor([70, 71, 72], device=DEVICE)
    sampler.set_sequence(1, drawing, 1, [1])
    sampler.sample(logits[1:2].to(DEVICE), ids, first=1)
    assert ids.tolist() == [70, expected[0][1], 72]
    for (a, b, c), (_, again, _) in zip(expected[2:], expected[1:], strict=False):
        assert draws(sampler, logits) == [[a, again, c]] and again != b


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9}])
def test_logits_that_are_no_numbers_give_no_id(params: dict[str, float]) -> None:
    logits = randn(5, 1500)
    logits[0, 1400] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, ::2] = -math.inf  # are numbers enough
    ids, sampler = draw(logits, SamplingParams(**params))
    assert ids[:3] == [-1, -1, -1]
    assert ids[3] % 2 == 1 and ids[4] >= 0
    assert sampler.seen.sum(1).tolist() == [0, 0, 0, 1, 1]


def test_a_nan_is_found_behind_the_penalty_and_the_mask() -> None:
    logits = torch.tensor([[0.0, math.nan, 2.0]])
    sampler = DeviceSampler(1, 3, DEVICE)
    sampler.set(SamplingParams(temperature=0, repeat_penalty=1.1), 0, [[1]])
    sampler.allow(torch.tensor([[0b101]], dtype=torch.int32))
    assert draws(sampler, logits) == [[-1]]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 50},
        {"temperature": 50, "top_k": 3},
        {"temperature": 50, "min_p": 0.1},
    ],
)
def test_a_mask_leaves_only_what_it_allows(params: dict[str, float]) -> None:
    allowed = [{0, 31, 33}, {1099}, set()]
    logits = randn(3, 1100)
    mask = torch.zeros(3, 35, dtype=torch.int64)
    for row, ids in zip(mask, allowed, strict=True):
        for i in ids:
            row[i // 32] |= 1 << i % 32
    sampler = DeviceSampler(3, 1100, DEVICE)
    sampler.set(SamplingParams(**params), 0, None)
    sampler.allow(mask.to(torch.int32))  # keeps the low 32 bits, of which the highest is the sign
    drawn = draws(sampler, logits, 4)
    assert all(ids[0] in allowed[0] and ids[1:] == [1099, -1] for ids in drawn)
    if params["temperature"] == 0:
        assert drawn[0][0] == max(allowed[0], key=lambda i: float(logits[0, i]))
    sampler.allow(None)
    assert draws(sampler, logits)[0][2] >= 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e40, 1e308])
@pytest.mark.parametrize("repeat_penalty", [0.01, 1.0, 100.0])
def test_extreme_parameters_still_choose_a_token(temperature: float, repeat_penalty: float) -> None:
    params = SamplingParams(
        temperature=temperature, repeat_penalty=repeat_penalty, top_k=3, top_p=0.9, min_p=0.1
    )
    logits = torch.tensor([[3e38, 0.0, -math.inf, -3e38, 2.0]])
    (token_id,), _ = draw(logits, params, seen=[[0, 1, 3]])
    assert token_id in ({0} if temperature < 1 else {0, 1, 4})


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are captured on a GPU")
@pytest.mark.parametrize("pdl", [False, True])
def test_one_captured_graph_serves_all_parameters(pdl: bool) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    logits = (randn(4, 131072) * 3).to(DEVICE)
    ids = torch.empty(4, dtype=torch.int64, device=DEVICE)
    sampler, eager = (DeviceSampler(4, 131072, DEVICE) for _ in range(2))
    sampler.sample(logits, ids, pdl=pdl)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(logits, ids, pdl=pdl)
    for case in [{}, *CASES.values()]:
        params = SamplingParams(**{"temperature": 1.0, **case})
        for one in (sampler, eager):
            one.set(params, 5, [[1], [2], [], [3]])
            one.set_sequence(2, SamplingParams(**{"temperature": 0.5, **case}), 6, [7])
        for _ in range(3):
            graph.replay()
            assert ids.tolist() == draws(eager, logits)[0]


@pytest.mark.skipif(DEVICE == "cpu", reason="too many tokens for the interpreter")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab_size", [32000, 32768, 131072])
def test_truncation_of_large_vocabularies_is_that_of_the_reference(case: str, vocab_size: int) -> None:
    check_truncation(randn(1, vocab_size) * 3, SamplingParams(**{"temperature": 1.0, **CASES[case]}))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_gpu_and_spill_nothing(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True
    )
    if "cannot compile" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert len(usage) == 2
    for name, one in usage.items():
        assert one["local"] == one["stack"] == 0, f"{name} spills: {one}"
        assert one["shared"] <= (32 << 10), f"{name} takes more shared memory than reductions need: {one}"


POINTERS = {
    **dict.fromkeys(["logits", "floats", "adjusted", "chunk_floats", "near", "least"], "*fp32"),
    **dict.fromkeys(["allowed", "is_masked", "n_draws", "chunk_ids", "near_ids"], "*i32"),
    "seen": "*u8",
    "ints": "*i64",
    "token_ids": "*i64",
}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, warps: int) -> dict[str, int]:
    """What a kernel takes, compiled as a launch with a vocabulary of 131,072 would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**POINTERS, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if name not in constants
        },
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", listing) for name in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, listing
    return {
        "registers": int(registers[1]),
        "stack": int(stack[1]),
        "local": int(local[1]) + made.asm["ptx"].count(".local"),
        "shared": made.metadata.shared,
    }


def main(capability: int) -> None:
    """Print as JSON what the kernels take."""
    pdl = capability >= 90
    adjust = {"CHUNK": sample.CHUNK, "PDL": pdl}
    choose = {"CHUNKS": 131072 // sample.CHUNK, "BLOCK": sample.BLOCK, "PDL": pdl}
    usage = {
        "adjust": compiled(sample._adjust_kernel, adjust, capability, warps=4),
        "choose": compiled(sample._choose_kernel, choose, capability, warps=16),
    }
    print(json.dumps(usage))


if __name__ == "__main__":
    try:
        from triton.backends.nvidia import compiler  # noqa: F401
    except ImportError as error:
        sys.exit(f"this triton cannot compile for NVIDIA's cards: {error}")
    main(int(sys.argv[1]))
