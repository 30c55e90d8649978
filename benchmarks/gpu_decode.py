"""Decode speed of a 7B model with random weights on this machine's GPU,.

    python benchmarks/gpu_decode.py [--quick] [--seqs 1,8,16]

One run: the bandwidth of a plain read, then whole steps, greedy sampling included, at several positions and numbers of
sequences, then the matmuls alone by torch's int4 kernel. Each figure is the median of repeats; percentages are of the
bandwidth that was read in this run.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from shapes import MISTRAL_7B

from mistralcli.cache import KVCache
from mistralcli.config import ModelConfig
from mistralcli.decoder import Decoder
from mistralcli.model import Transformer
from mistralcli.sampling import SamplingParams
from quant.kernels.matvec import Weight
from quant.schemes.affine import Affine, AffineLinear

STEPS, REPEATS = 64, 5


def random_linear(scheme: Affine, in_features: int, out_features: int) -> AffineLinear:
    """A layer with random codes and scales such that outputs are about as large as inputs."""
    layer = AffineLinear(scheme.for_in_features(in_features), in_features, out_features)
    n_groups = in_features // (scheme.group_size or in_features)
    layer.qweight = torch.randint(
        0, 256, (out_features, in_features * scheme.bits // 8), dtype=torch.uint8, device="cuda"
    )
    spread = in_features**-0.5 / (4.6 if scheme.bits == 4 else 74)  # the codes' standard deviation
    layer.scales = (torch.rand(out_features, n_groups, device="cuda") * 0.2 + 0.9).mul(spread).bfloat16()
    return layer


def random_model(config: ModelConfig, layers: Affine, head: Affine) -> Transformer:
    def linear(name: str, in_features: int, out_features: int) -> AffineLinear:
        return random_linear(head if name == "output" else layers, in_features, out_features)

    with torch.device("meta"):
        model = Transformer(config, linear, torch.bfloat16)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.randn(parameter.shape, dtype=torch.bfloat16, device="cuda")
            value = torch.ones_like(value) if value.ndim == 1 else value
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model


def median_s(run: Callable[[], None]) -> float:
    """Median of the seconds of `run` by CUDA events."""
    run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second of summing 4 GiB, by torch's reduction in a graph."""
    data = torch.ones(1 << 29, dtype=torch.float64, device="cuda")
    out = torch.empty((), dtype=torch.float64, device="cuda")
    return data.nbytes / median_s(lambda: torch.sum(data, 0, out=out))


def weight_bytes(model: Transformer) -> int:
    """What one step reads of the weights."""
    linears = (module for module in model.modules() if isinstance(module, AffineLinear))
    return sum(
        Weight.quantized(one.qweight, one.scales, one.zeros, one.scheme.bits).size_bytes for one in linears
    )


def decode(
    config: ModelConfig, layers: Affine, head: Affine, n_seqs: int, places: list[int], read: float
) -> None:
    """Print tokens a second from each of the places on, greedily sampled."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(config, layers, head)
    cache = KVCache(
        config, max_seq_len=config.max_seq_len, n_seqs=n_seqs, dtype=torch.bfloat16, device="cuda"
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    decoder = Decoder(model, cache)
    decoder.sampler.set(SamplingParams(temperature=0), 0, None)
    n_bytes = weight_bytes(model)
    for place in places:

        def run(place: int = place) -> None:
            cache.last.fill_(place - 1)
            for _ in range(STEPS):
                decoder.step()

        step_s = median_s(run) / STEPS
        keys = min(place, config.sliding_windows[0] or place)
        read_bytes = n_bytes + 2 * 2 * n_seqs * config.n_layers * keys * config.n_kv_heads * config.head_dim
        assert decoder.logits.isfinite().all()
        print(
            f"ours {layers.name}, head {head.name}, window {config.sliding_windows[0]}, {n_seqs} sequences at {place}: "
            f"{n_seqs / step_s:.0f} tok/s, {step_s * 1e3:.3f} ms, {read_bytes / 1e9:.2f} GB a step, "
            f"{read_bytes / step_s / 1e12:.2f} TB/s = {read_bytes / step_s / read:.0%} of a plain read, "
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB",
            flush=True,
        )


def tinygemm_s(config: ModelConfig) -> float:
    """Seconds of a step's matmuls alone, by torch's int4 kernel for few rows, in one graph."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = [
        (q_dim + 2 * kv_dim, config.dim),
        (config.dim, q_dim),
        (2 * config.hidden_dim, config.dim),
        (config.dim, config.hidden_dim),
    ]
    shapes = shapes * config.n_layers + [(config.vocab_size, config.dim)]
    weights = []
    for out_features, in_features in shapes:
        codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(in_features // 128, out_features, 2, dtype=torch.bfloat16, device="cuda")
        weights.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales))
    inputs = {width: torch.randn(1, width, dtype=torch.bfloat16, device="cuda") for _, width in shapes}

    def run() -> None:
        for (_, width), (packed, scales) in zip(shapes, weights, strict=True):
            torch.ops.aten._weight_int4pack_mm(inputs[width], packed, 128, scales)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_s(graph.replay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batch 1 alone")
    parser.add_argument("--seqs", help="these numbers of sequences alone, in a short context")
    options = parser.parse_args()
    read = read_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: plain read {read / 1e12:.2f} TB/s",
        flush=True,
    )
    int4, int8 = Affine(4, 128), Affine(8)
    short = replace(MISTRAL_7B, max_seq_len=8448)
    windowed = replace(MISTRAL_7B, sliding_windows=(4096,) * 32)
    if options.seqs:
        for n_seqs in map(int, options.seqs.split(",")):
            decode(replace(short, max_seq_len=512), int4, int4, n_seqs, [64], read)
        return
    decode(short, int4, int4, 1, [64, 8192], read)
    decode(short, int4, int8, 1, [64], read)
    decode(windowed, int4, int4, 1, [64, 4096, 32000], read)
    decode(short, int8, int8, 1, [64], read)
    peer_s = tinygemm_s(MISTRAL_7B)
    print(
        f"torch's tinygemm, int4, the same matmuls alone: {1 / peer_s:.0f} tok/s, {peer_s * 1e3:.3f} ms",
        flush=True,
    )
    if not options.quick:
        for n_seqs in (2, 4, 8, 16):
            decode(replace(short, max_seq_len=512), int4, int4, n_seqs, [64], read)


if __name__ == "__main__":
    main()
