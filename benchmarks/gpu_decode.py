"""Decode speed of a 7B model with random weights on this machine's GPU.

    python benchmarks/gpu_decode.py [--quick] [--seqs 1,8,16]

One run: the bandwidth of a plain read, then whole steps, greedy sampling included, at several positions and numbers of
sequences, then a compiled engine on torch's own int4 matmul. Each figure is the median of repeats; percentages are of
the bandwidth that was read in this run.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from shapes import MISTRAL_7B

from mistralcli.cache import KVCache
from mistralcli.config import ModelConfig
from mistralcli.decoder import Decoder
from mistralcli.model import Transformer
from mistralcli.run_options import SamplingParams
from quant.kernels.matvec import Weight
from quant.schemes.affine import Affine, AffineLinear

STEPS, REPEATS = 64, 5
ON_CARD: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}


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


class TinygemmEngine:
    """A peer of a hundred lines, as gpt-fast does it: torch's int4 matmul for few rows in a compiled model, a static
    cache, whole steps in one CUDA graph; greedy, one sequence.
    """

    def __init__(self, config: ModelConfig, group_size: int = 128) -> None:
        self.config, self.group_size = config, group_size
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.layers = [
            (
                self._weight(q_dim + 2 * kv_dim, config.dim),
                self._weight(config.dim, q_dim),
                self._weight(2 * config.hidden_dim, config.dim),
                self._weight(config.dim, config.hidden_dim),
                torch.randn(2, config.n_kv_heads, config.max_seq_len, config.head_dim, **ON_CARD),
            )
            for _ in range(config.n_layers)
        ]
        self.head = self._weight(config.vocab_size, config.dim)
        self.embedding = torch.randn(config.vocab_size, config.dim, **ON_CARD)
        self.norm = torch.ones(config.dim, **ON_CARD)
        angles = torch.arange(config.max_seq_len, device="cuda")[:, None] * config.rope_theta ** (
            -torch.arange(0, config.head_dim, 2, device="cuda") / config.head_dim
        )
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.token_id = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._layer = torch.compile(self._layer_eagerly, fullgraph=True, dynamic=False)

    def _weight(self, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(in_features // self.group_size, out_features, 2, **ON_CARD)
        return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales * in_features**-0.5 / 4.6

    def _matmul(self, x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, weight[0], self.group_size, weight[1])

    def _normed(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(h, (h.shape[-1],), self.norm, self.config.norm_eps)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[self.position], self.sin[self.position]
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _layer_eagerly(
        self,
        h: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor],
        output: tuple[torch.Tensor, torch.Tensor],
        gate_up: tuple[torch.Tensor, torch.Tensor],
        down: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
    ) -> torch.Tensor:
        config = self.config
        heads = self._matmul(self._normed(h), qkv).view(-1, config.head_dim)
        q, k, v = heads.split([config.n_heads, config.n_kv_heads, config.n_kv_heads])
        cache[0].index_copy_(1, self.position, self._rotated(k)[:, None])
        cache[1].index_copy_(1, self.position, v[:, None])
        group = config.n_heads // config.n_kv_heads
        mask = torch.arange(config.max_seq_len, device="cuda") <= self.position
        attended = torch.nn.functional.scaled_dot_product_attention(
            self._rotated(q)[None, :, None],
            cache[0].repeat_interleave(group, 0)[None],
            cache[1].repeat_interleave(group, 0)[None],
            attn_mask=mask[None, None, None],
        )
        h = h + self._matmul(attended.reshape(1, -1), output)
        gate, up = self._matmul(self._normed(h), gate_up).chunk(2, -1)
        return h + self._matmul(torch.nn.functional.silu(gate) * up, down)

    def _step(self) -> None:
        h = self.embedding[self.token_id]
        for layer in self.layers:
            h = self._layer(h, *layer)
        self.token_id.copy_(self._matmul(self._normed(h), self.head).argmax(-1))
        self.position += 1

    @torch.no_grad()
    def step_s(self, place: int) -> float:
        """Seconds of a step from `place` on."""
        self._step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()

        def run() -> None:
            self.position.fill_(place)
            for _ in range(STEPS):
                graph.replay()

        return median_s(run) / STEPS


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
    for place in (64, 8192):
        torch.cuda.empty_cache()
        peer_s = TinygemmEngine(replace(MISTRAL_7B, max_seq_len=512 if place == 64 else 8448)).step_s(place)
        print(f"torch.compile and tinygemm, int4, at {place}: {1 / peer_s:.0f} tok/s, {peer_s * 1e3:.3f} ms")
    if not options.quick:
        for n_seqs in (2, 4, 8, 16):
            decode(replace(short, max_seq_len=512), int4, int4, n_seqs, [64], read)


if __name__ == "__main__":
    main()
