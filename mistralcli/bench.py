"""How fast a model runs on this machine: pre-fill, decoding, memory, and the share of the memory's speed that it gets.

Decoding one sequence reads all weights and the keys and values in sight for each token, so the bandwidth of the memory
bounds it: a figure is best read as a percentage of that.
"""

import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mistralcli import __version__
from mistralcli.device import OUTSIDE_TORCH_BYTES, taken_bytes
from mistralcli.doctor.bandwidth import cpu_bandwidth, cuda_bandwidth, data_to_read
from mistralcli.engine import Engine
from mistralcli.errors import UsageError
from mistralcli.model import Transformer
from mistralcli.run_options import SamplingParams
from mistralcli.sampling import Sampler
from mistralcli.session import Session
from quant.schemes.affine import AffineLinear


@dataclass(frozen=True)
class BenchOptions:
    """Prompt lengths to pre-fill, positions to decode from, tokens to decode there, and runs to take the median of."""

    prompts: Sequence[int]
    positions: Sequence[int]
    n_tokens: int
    repeats: int


@dataclass(frozen=True)
class Prefill:
    """Medians: tokens a second of a prompt of `n_tokens`, up to the choice of the first id."""

    n_tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class Decoding:
    """Medians of decoding from `position` on. `bytes_per_token`: weights, keys and values that a step has to read."""

    position: int
    tokens_per_s: float
    bytes_per_token: int
    bandwidth_share: float


@dataclass(frozen=True)
class BenchReport:
    """What `mistral bench` reports. Sizes in bytes; `peak_bytes` is what the process took at most, on its device."""

    model: str
    device: str
    device_name: str
    dtype: str
    ctx: int
    chunk: int
    versions: dict[str, str]
    load_s: float
    weights_bytes: int
    cache_bytes: int
    peak_bytes: int
    read_bytes_per_s: float
    prefill: list[Prefill]
    decode: list[Decoding]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_options(device: torch.device, quick: bool) -> BenchOptions:
    """Lengths that take seconds on a device of that kind; on a CPU `quick` is for small models and small patience."""
    if device.type == "cuda":
        return BenchOptions((512, 2048, 8192), (64, 8192, 32_000), 128, 3 if quick else 5)
    if quick:
        return BenchOptions((64, 256), (64, 512), 16, 3)
    return BenchOptions((128, 512), (64, 1024), 32, 3)


def fitting(options: BenchOptions, ctx: int) -> BenchOptions:
    """The same without what is longer than the context; where all is, as much as fits.

    Raises:
        UsageError: the context has no room for two tokens behind one.
    """
    if ctx < 3:
        raise UsageError(f"a context of {ctx} positions is too short to measure in", "ask for a longer --ctx")
    n_tokens = max(2, min(options.n_tokens, ctx // 2))
    prompts = [n for n in options.prompts if n < ctx] or [ctx - 1]
    positions = [n for n in options.positions if n + n_tokens <= ctx] or [ctx - n_tokens]
    return BenchOptions(prompts, positions, n_tokens, options.repeats)


def run_bench(
    session: Session,
    options: BenchOptions,
    on_step: Callable[[str], None],
    read_bytes_per_s: float | None = None,
) -> BenchReport:
    """Measure a loaded model; `on_step` is told what is being measured.

    read_bytes_per_s: what `read_bandwidth` gave before the model took the memory; without it, it is measured behind.
    """
    engine, options = session.engine, fitting(options, session.max_seq_len)
    prefill, decode = [], []
    for n_tokens in options.prompts:
        on_step(f"pre-fill of {n_tokens} tokens")
        prefill.append(Prefill(n_tokens, _prefill_tokens_per_s(engine, n_tokens, options.repeats)))
    speeds = {}
    for position in options.positions:
        on_step(f"decoding from {position} positions on")
        speeds[position] = _decode_tokens_per_s(engine, position, options)
    peak = peak_bytes(engine.device)
    if read_bytes_per_s is None:
        on_step("memory bandwidth")
    read = read_bytes_per_s or read_bandwidth(engine.device)
    for position, speed in speeds.items():
        n_bytes = bytes_per_token(engine, position + options.n_tokens // 2)
        decode.append(Decoding(position, speed, n_bytes, n_bytes * speed / read))
    return BenchReport(
        model=session.name,
        device=engine.device.type,
        device_name=device_name(engine.device),
        dtype=str(engine.model.dtype).removeprefix("torch."),
        ctx=engine.max_seq_len,
        chunk=engine.chunk,
        versions={"mistral": __version__, "torch": torch.__version__},
        load_s=session.load_s,
        weights_bytes=session.plan.weights_bytes,
        cache_bytes=engine.cache.size_bytes,
        peak_bytes=peak,
        read_bytes_per_s=read,
        prefill=prefill,
        decode=decode,
    )


def _prompt(engine: Engine, n_tokens: int, seed: int) -> list[int]:
    """Random ids. Those of another seed begin with another id, so that the cache is of no use."""
    vocab_size = engine.model.config.vocab_size
    choose = random.Random(seed)
    return [seed % vocab_size, *(choose.randrange(vocab_size) for _ in range(n_tokens - 1))]


def _generate(engine: Engine, prompt: list[int], n_tokens: int) -> list[float]:
    """Seconds from the call to each of the ids, chosen greedily."""
    started, times = time.perf_counter(), []
    for _ in engine.generate(prompt, Sampler(SamplingParams(temperature=0)), max_tokens=n_tokens):
        times.append(time.perf_counter() - started)
    return times


def _prefill_tokens_per_s(engine: Engine, n_tokens: int, repeats: int) -> float:
    """The median of `repeats` runs behind one that does not count."""
    runs = [_generate(engine, _prompt(engine, n_tokens, seed), 1)[0] for seed in range(repeats + 1)]
    return n_tokens / statistics.median(runs[1:])


def _decode_tokens_per_s(engine: Engine, position: int, options: BenchOptions) -> float:
    """The same, from the first id to the last; the prompt stays in the cache where it can be rewound to."""
    prompt = _prompt(engine, position, seed=0)
    runs = [_generate(engine, prompt, options.n_tokens) for _ in range(options.repeats + 1)]
    return (options.n_tokens - 1) / statistics.median(times[-1] - times[0] for times in runs[1:])


def bytes_per_token(engine: Engine, position: int) -> int:
    """What a decode step has to read at a position: weights (of an embedding one row, not counted), keys and values."""
    slots = sum(min(position, window or position) for window in engine.model.config.sliding_windows)
    allocated = sum(layer.keys.shape[2] for layer in engine.cache.layers)
    return step_weights_bytes(engine.model) + engine.cache.size_bytes // max(1, allocated) * slots


def step_weights_bytes(model: Transformer) -> int:
    """Bytes of the weights that a step multiplies with: all but an embedding that is not the head too."""
    tensors = [*model.parameters(), *model.buffers()]
    affine = [module for module in model.modules() if isinstance(module, AffineLinear)]
    prepared = sum(one.interleaved.size_bytes for one in affine if one.interleaved is not None)
    skipped = 0 if model.output is None else model.tok_embeddings.weight.nbytes
    return sum(tensor.nbytes for tensor in tensors) + prepared - skipped


def peak_bytes(device: torch.device) -> int:
    """The most that this process took: on CUDA torch's peak and what it takes beside it, on the CPU resident memory."""
    if device.type == "cuda":
        outside = max(0, taken_bytes(device) - torch.cuda.memory_reserved(device)) or OUTSIDE_TORCH_BYTES
        return torch.cuda.max_memory_reserved(device) + outside
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's would count what the parent had before it started this program
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_bandwidth(device: torch.device, limit_bytes: int | None = None) -> float:
    """Bytes a second that the device reads, measured now, within a limit on the process."""
    data = data_to_read(device, limit_bytes)
    if device.type != "cuda":
        return cpu_bandwidth(data, torch.get_num_threads())
    read = cuda_bandwidth(data)
    del data
    torch.cuda.empty_cache()
    return read


def device_name(device: torch.device) -> str:
    """What the device is called by its maker, as far as it says so."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
