"""Memory before it is taken: weights, cache and workspace against what is free on the device."""

from dataclasses import dataclass, replace

import torch

from mistralcli.cache import DEFAULT_SLACK, cache_size_bytes, n_slots_by_layer
from mistralcli.config import ModelConfig
from mistralcli.device import DTYPES, LARGE_CUDA_BYTES, LARGE_CUDA_SLACK
from mistralcli.errors import NotEnoughMemoryError, UsageError
from mistralcli.ops import attention
from mistralcli.prefill import MOST_STAGED, works_ahead
from mistralcli.units import size_text
from mistralcli.weights import LoadedSizes

LONGEST_DEFAULT_CTX = 32_768
CTX_STEP = 1024
KV_DTYPES = {"int8": torch.int8}
"""What `--kv` may name on every device; on the CPU it may name any type that can be computed in, too."""

CPU_CACHE_DTYPE = torch.float16
"""Of a float32 model's cache on the CPU: half the memory, and half as much to read. bfloat16, of the same size, rounds
eight times as much; docs/log.md has what either adds."""

_TILE_BYTES = 128 << 20
"""What the matmuls take for dequantized tiles of a weight, and on the CPU the allocator's slack."""
_CUDA_BYTES = 128 << 20
"""What torch takes on CUDA beside what is asked of it: cuBLAS's workspaces (2 × 32 MiB on Hopper), and segments that
are larger than what is in them."""
_JOINED = 2.1
"""A decoder joins two of a layer's largest matrices and their scales in new memory before it drops the old."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a model needs at a context length, and what is free. All sizes in bytes.

    `free_is` says what the free memory is: all that the machine has, or what a limit leaves.
    """

    ctx: int
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    free_bytes: int
    free_is: str = "free"

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes

    def describe(self) -> str:
        """The sum, in words."""
        parts = (
            self.weights_bytes,
            self.cache_bytes,
            self.workspace_bytes,
            self.total_bytes,
            self.free_bytes,
        )
        weights, cache, workspace, total, free = map(size_text, parts)
        return f"weights {weights} + cache {cache} + workspace {workspace} = {total} of {free} {self.free_is}"


@dataclass(frozen=True)
class Demand:
    """What a run asks for: the loaded weights, the type it computes in, and how prompts go through."""

    weights_bytes: int
    dtype: torch.dtype
    chunk: int
    slack: int = DEFAULT_SLACK
    device_type: str = "cpu"
    loading_bytes: int = 0
    """What a GPU holds beside the weights and the cache for a while, until they are loaded and joined."""
    cache_dtype: torch.dtype | None = None
    """What keys and values are stored as; without it, as what is computed in."""
    n_seqs: int = 1
    """Sequences with a cache of their own each."""


def choose_cache_dtype(
    kv: str | None, dtype: torch.dtype, device_type: str = "cuda", exact: bool = False
) -> torch.dtype:
    """The type to store keys and values in, where computing in `dtype`; `kv` may name one.

    Without it, it is the one that is computed in, but 16 bits for float32 on the CPU unless all is to be exact.

    Raises:
        UsageError: it names none that the device stores.
    """
    if kv is None:
        return CPU_CACHE_DTYPE if (device_type, dtype, exact) == ("cpu", torch.float32, False) else dtype
    known = KV_DTYPES | (DTYPES if device_type == "cpu" else {})
    if kv not in known:
        raise UsageError(
            f"--kv {kv} is not a type to store the cache in on {device_type}",
            f"choose {' or '.join(known)}, or leave --kv out",
        )
    return known[kv]


def demand_of(
    sizes: LoadedSizes,
    dtype: torch.dtype,
    chunk: int,
    slack: int,
    device_type: str = "cpu",
    cache_dtype: torch.dtype | None = None,
    n_seqs: int = 1,
) -> Demand:
    """The demand of a model whose weights take `sizes` to compute in `dtype`."""
    loading = max(int(_JOINED * sizes.largest_in_layer), sizes.largest_cast) if device_type == "cuda" else 0
    return Demand(sizes.total, dtype, chunk, slack, device_type, loading, cache_dtype, n_seqs)


def plan_memory(config: ModelConfig, demand: Demand, ctx: int, free_bytes: int) -> MemoryPlan:
    """The memory that `ctx` positions take; the workspace is an upper bound of what a chunk or loading takes."""
    chunk = min(demand.chunk, ctx)
    running = _activations_bytes(config, demand, chunk) + _attention_bytes(config, demand, ctx)
    fixed = 4 * config.vocab_size * 4 * demand.n_seqs
    cache_dtype = demand.cache_dtype or demand.dtype
    if demand.device_type == "cuda":
        # Chunks share their memory, captured or not, but each graph keeps its result.
        fixed += _CUDA_BYTES + (chunk + 4096) * config.dim * demand.dtype.itemsize
        if demand.n_seqs > 1:  # the cache that a prompt is in before it is copied to its sequence's
            fixed += cache_size_bytes(config, min(ctx, MOST_STAGED), slack=demand.slack, dtype=cache_dtype)
    cache = cache_size_bytes(config, ctx, n_seqs=demand.n_seqs, slack=demand.slack, dtype=cache_dtype)
    slots = n_slots_by_layer(config, ctx, demand.slack)
    # On the CPU the buffers of a layer grow, and are there twice for a while.
    growing = 0 if demand.device_type == "cuda" else cache * max(slots) // sum(slots)
    workspace = max(running, demand.loading_bytes, growing) + fixed
    return MemoryPlan(ctx, demand.weights_bytes, cache, workspace, free_bytes)


def _activations_bytes(config: ModelConfig, demand: Demand, chunk: int) -> int:
    """What a block holds at once for a chunk: on CUDA by its three fullest moments, else their sum."""
    dim, hidden = config.dim, config.hidden_dim
    width = max(dim, config.n_heads * config.head_dim)
    token_bytes = chunk * demand.dtype.itemsize
    if demand.device_type != "cuda":
        return token_bytes * (3 * hidden + 8 * width) + _TILE_BYTES
    n_tiles = 2 if works_ahead(demand.chunk) else 1
    tile_bytes = n_tiles * min(_TILE_BYTES, hidden * width * demand.dtype.itemsize)
    gate_and_up = token_bytes * (2 * hidden + 3 * dim) + tile_bytes
    attending = token_bytes * 8 * width + tile_bytes
    return max(gate_and_up, attending, token_bytes * 3 * (hidden + dim))


def _attention_bytes(config: ModelConfig, demand: Demand, ctx: int) -> int:
    """What attention takes for a chunk: rotary tables, and a mask or all scores where its kernel holds them."""
    chunk, slots = min(demand.chunk, ctx), max(n_slots_by_layer(config, ctx, demand.slack))
    tables = 4 * chunk * (config.head_dim // 2) * torch.float64.itemsize
    try:
        by_kernel = attention.on(demand.device_type) is not attention.reference
    except ImportError:
        by_kernel = False
    if by_kernel:
        # PyTorch takes a mask of bools and makes one of float32; keys and values of a head are unpacked for it.
        return tables + (0 if demand.device_type == "cuda" else slots * (5 * chunk + 2 * 4 * config.head_dim))
    piece = min(chunk, demand.slack) if any(config.sliding_windows) else chunk
    return tables + 4 * chunk * slots + 3 * 4 * config.n_heads * piece * slots


def default_ctx(config: ModelConfig) -> int:
    """The context length without --ctx and with memory enough: the model's own, at most 32,768."""
    return min(config.max_seq_len, LONGEST_DEFAULT_CTX)


def default_slack(device: torch.device, room_bytes: int) -> int:
    """Tokens of a prompt that attention over a sliding window takes at once, with so much memory to be had."""
    is_large = device.type == "cuda" and room_bytes >= LARGE_CUDA_BYTES
    return LARGE_CUDA_SLACK if is_large else DEFAULT_SLACK


def check_ctx(config: ModelConfig, ctx: int) -> int:
    """`ctx` itself, or UsageError when the model was not made for so many positions."""
    if not 2 <= ctx <= config.max_seq_len:
        raise UsageError(
            f"--ctx {ctx} is not between 2 and the model's own context of {config.max_seq_len} positions",
            "leave it out for as much of that as fits in memory",
        )
    return ctx


def fitting_plan(config: ModelConfig, demand: Demand, free_bytes: int, free_is: str = "free") -> MemoryPlan:
    """The longest context that fits, from the default down in steps of 1,024; `free_is` as in the plan.

    Raises:
        NotEnoughMemoryError: not even the shortest fits.
    """
    longest = default_ctx(config)
    shortest = min(CTX_STEP, longest)
    for ctx in (longest, *range((longest - 1) // CTX_STEP * CTX_STEP, shortest - 1, -CTX_STEP)):
        plan = replace(plan_memory(config, demand, ctx, free_bytes), free_is=free_is)
        if plan.fits:
            return plan
    more_room = "close other programs" if free_is == "free" else "raise the limit"
    raise NotEnoughMemoryError(
        f"the model does not fit in memory: {plan.describe()}",
        f"{more_room}, or make a smaller build with `mistral quantize --bits 4`",
    )


def requested_plan(
    config: ModelConfig, demand: Demand, ctx: int, free_bytes: int, free_is: str = "free"
) -> MemoryPlan:
    """The plan for the context length that the user asked for.

    Raises:
        UsageError: the model was not made for so many positions.
        NotEnoughMemoryError: it does not fit; the hint says what would.
    """
    plan = replace(plan_memory(config, demand, check_ctx(config, ctx), free_bytes), free_is=free_is)
    if not plan.fits:
        fitting = fitting_plan(config, demand, free_bytes, free_is)
        raise NotEnoughMemoryError(
            f"a context of {ctx} positions does not fit in memory: {plan.describe()}",
            f"--ctx {fitting.ctx} would fit",
        )
    return plan
