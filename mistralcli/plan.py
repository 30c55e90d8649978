"""Memory before it is taken: weights, cache and workspace against what is free on the device."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mistralcli.cache import DEFAULT_SLACK, cache_size_bytes, n_slots_by_layer
from mistralcli.config import ModelConfig
from mistralcli.errors import NotEnoughMemoryError, UsageError
from mistralcli.weights import loaded_size_bytes

LONGEST_DEFAULT_CTX = 32_768
CTX_STEP = 1024

_TILE_BYTES = 128 << 20
"""What the reference matmuls take for dequantized tiles of a weight, and the allocator's slack."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a model needs at a context length, and what is free. All sizes in bytes."""

    ctx: int
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    free_bytes: int

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
        weights, cache, workspace, total, free = (f"{part / 1e9:.2f} GB" for part in parts)
        return f"weights {weights} + cache {cache} + workspace {workspace} = {total} of {free} free"


@dataclass(frozen=True)
class Demand:
    """What a run asks for: the loaded weights, the type it computes in, and how prompts go through."""

    weights_bytes: int
    dtype: torch.dtype
    chunk: int
    slack: int = DEFAULT_SLACK


def demand_of(directory: Path, dtype: torch.dtype, chunk: int, slack: int) -> Demand:
    """The demand of the model in `directory`, from its files' headers."""
    return Demand(loaded_size_bytes(directory, dtype), dtype, chunk, slack)


def plan_memory(config: ModelConfig, demand: Demand, ctx: int, free_bytes: int) -> MemoryPlan:
    """The memory that `ctx` positions take. The workspace is an upper estimate of activations and one chunk's masks."""
    slots = max(n_slots_by_layer(config, ctx, demand.slack))
    chunk = min(demand.chunk, ctx)
    activations = chunk * (3 * config.hidden_dim + 8 * config.dim) * demand.dtype.itemsize
    masks = chunk * slots * 4
    workspace = activations + masks + 4 * config.vocab_size * 4 + _TILE_BYTES
    cache = cache_size_bytes(config, ctx, slack=demand.slack, dtype=demand.dtype)
    return MemoryPlan(ctx, demand.weights_bytes, cache, workspace, free_bytes)


def default_ctx(config: ModelConfig) -> int:
    """The context length without --ctx and with memory enough: the model's own, at most 32,768."""
    return min(config.max_seq_len, LONGEST_DEFAULT_CTX)


def check_ctx(config: ModelConfig, ctx: int) -> int:
    """`ctx` itself, or UsageError when the model was not made for so many positions."""
    if not 2 <= ctx <= config.max_seq_len:
        raise UsageError(
            f"--ctx {ctx} is not between 2 and the model's own context of {config.max_seq_len} positions"
        )
    return ctx


def fitting_plan(config: ModelConfig, demand: Demand, free_bytes: int) -> MemoryPlan:
    """The longest context that fits, from the default down in steps of 1,024.

    Raises:
        NotEnoughMemoryError: not even the shortest fits.
    """
    longest = default_ctx(config)
    shortest = min(CTX_STEP, longest)
    for ctx in (longest, *range((longest - 1) // CTX_STEP * CTX_STEP, shortest - 1, -CTX_STEP)):
        plan = plan_memory(config, demand, ctx, free_bytes)
        if plan.fits:
            return plan
    raise NotEnoughMemoryError(
        f"the model does not fit in memory: {plan.describe()}",
        "close other programs, or make a smaller build with `mistral quantize --bits 4`",
    )


def requested_plan(config: ModelConfig, demand: Demand, ctx: int, free_bytes: int) -> MemoryPlan:
    """The plan for the context length that the user asked for.

    Raises:
        UsageError: the model was not made for so many positions.
        NotEnoughMemoryError: it does not fit; the hint says what would.
    """
    plan = plan_memory(config, demand, check_ctx(config, ctx), free_bytes)
    if not plan.fits:
        fitting = fitting_plan(config, demand, free_bytes)
        raise NotEnoughMemoryError(
            f"a context of {ctx} positions does not fit in memory: {plan.describe()}",
            f"--ctx {fitting.ctx} would fit",
        )
    return plan
