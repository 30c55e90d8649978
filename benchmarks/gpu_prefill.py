"""Pre-fill of a 7B model with random int4 weights on this machine's GPU, beside cuBLAS on the same matmuls in bfloat16.

    python benchmarks/gpu_prefill.py

One run, medians: the whole forward pass of a prompt, its matmuls alone, and the same matmuls with dense bfloat16
weights; then attention alone at 16k and 32k tokens, with a window of 4,096 and without.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from gpu_decode import median_s, random_model
from shapes import MISTRAL_7B

from mistralcli.cache import DEFAULT_SLACK, KVCache
from mistralcli.device import LARGE_CUDA_CHUNK, LARGE_CUDA_SLACK
from mistralcli.model import Transformer
from mistralcli.prefill import CapturedForward
from quant.kernels.ahead import Ahead
from quant.schemes.affine import Affine, AffineLinear

CHUNK = LARGE_CUDA_CHUNK
REPEATED = 4
"""Layers in a graph, so that its own start and end count for little."""
ROUNDS = 15


def linears(model: Transformer) -> list[AffineLinear]:
    """Those of one layer."""
    return [module for module in model.layers[0].modules() if isinstance(module, AffineLinear)]


def matmuls(
    model: Transformer, n_tokens: int, run: Callable[[AffineLinear, torch.Tensor], object]
) -> torch.cuda.CUDAGraph:
    """One layer's matmuls of the chunks of a prompt, REPEATED times, as a pass of `CapturedForward` launches them."""
    inputs = {
        size: torch.randn(min(n_tokens, CHUNK), size, dtype=torch.bfloat16, device="cuda")
        for size in (4096, 14336)
    }
    ahead, stream = Ahead(torch.device("cuda")), torch.cuda.Stream(priority=-1)

    def layers() -> None:
        with ahead.during_pass():
            for _ in range(REPEATED * max(1, n_tokens // CHUNK)):
                for linear in linears(model):
                    run(linear, inputs[linear.in_features])

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        layers()
    return graph


def layer_s(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Medians of the seconds of a layer, the graphs taking turns: a card at its limit of power slows down."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(3 + ROUNDS):
        for graph, own in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            own.append(start.elapsed_time(end) / 1e3 / REPEATED)
    return [statistics.median(own[3:]) for own in times]


@torch.no_grad()
def prefill_s(model: Transformer, n_tokens: int) -> float:
    """Seconds of a prompt through the model in chunks, up to its last hidden states."""
    config = model.config
    cache = KVCache(config, max_seq_len=n_tokens, slack=LARGE_CUDA_SLACK, dtype=torch.bfloat16, device="cuda")
    forward = CapturedForward(model, cache, CHUNK)
    ids = torch.randint(config.vocab_size, (1, n_tokens))

    def run() -> None:
        cache.rewind(0)
        for start in range(0, n_tokens, CHUNK):
            stop = min(start + CHUNK, n_tokens)
            forward(ids[:, start:stop], torch.arange(start, stop)[None])

    run()  # as they are; the first of `median_s` captures
    return median_s(run)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    int4 = Affine(4, 128)
    model = random_model(MISTRAL_7B, int4, int4)
    dense = {
        (one.out_features, one.in_features): torch.randn(
            one.out_features, one.in_features, dtype=torch.bfloat16, device="cuda"
        )
        for one in linears(model)
    }
    n_layers = MISTRAL_7B.n_layers
    for n_tokens in (512, 2048, 8192):
        peak_s, ours_s = layer_s(
            [
                matmuls(
                    model, n_tokens, lambda one, x: F.linear(x, dense[one.out_features, one.in_features])
                ),
                matmuls(model, n_tokens, lambda one, x: one(x)),
            ]
        )
        whole_s = prefill_s(model, n_tokens)
        print(
            f"pre-fill {n_tokens}: {n_tokens / whole_s:.0f} tok/s ({whole_s * 1e3:.1f} ms); matmuls "
            f"{ours_s * n_layers * 1e3:.1f} ms, cuBLAS bf16 {peak_s * n_layers * 1e3:.1f} ms: {peak_s / ours_s:.0%}; "
            f"whole pass {peak_s * n_layers / whole_s:.0%} of cuBLAS's matmuls",
            flush=True,
        )
    del model
    for n_tokens in (16384, 32768):
        for slack in (DEFAULT_SLACK, LARGE_CUDA_SLACK):
            times = {}
            for window in (None, 4096):
                config = replace(
                    MISTRAL_7B, n_layers=1, sliding_windows=(window,), hidden_dim=32, vocab_size=32
                )
                small = random_model(config, Affine(4, 32), Affine(4, 32))
                times[window] = attention_s(small, n_tokens, slack)
            print(
                f"attention of {n_tokens} tokens, a layer: {times[None] * 1e3:.2f} ms; windowed to 4,096, in pieces "
                f"of {slack} {times[4096] * 1e3:.2f} ms: {times[None] / times[4096]:.2f} times as fast",
                flush=True,
            )


@torch.no_grad()
def attention_s(model: Transformer, n_tokens: int, slack: int) -> float:
    """Seconds of writing and attending alone, in the pieces that a prompt goes through, all in one graph."""
    config = model.config
    cache = KVCache(config, max_seq_len=n_tokens, slack=slack, dtype=torch.bfloat16, device="cuda")
    shape = (1, CHUNK, config.n_heads + 2 * config.n_kv_heads, config.head_dim)
    qkv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    q, k, v = qkv.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=2)

    positions = torch.arange(n_tokens, device="cuda")[None]

    def run() -> None:
        for chunk in positions.split(CHUNK, dim=1):
            for piece in cache.begin_captured(chunk):
                model.layers[0].attention._attend(q, k, v, cache.layers[0], piece)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_s(graph.replay)


if __name__ == "__main__":
    main()
