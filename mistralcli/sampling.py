"""From logits to the next token id: temperature, top-k, top-p, min-p, repetition penalty, seed.

In NumPy or a kernel, on one thread: a row of logits is too short to be worth a second one, and PyTorch takes 1.3 ms for
what takes NumPy 0.07 (49,152 logits, an EPYC).
"""

import functools
import math
import os
import random
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mistralcli.errors import IntegrityError
from mistralcli.run_options import SamplingParams

if TYPE_CHECKING:
    from mistralcli.kernels.cpu.sample import Draw

Array = np.ndarray[tuple[int], np.dtype[np.floating]]

BLOCK = 256
"""Weights that are summed, or looked through, as one."""

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Sampler:
    """A seeded chooser of tokens: call it with logits and the ids so far.

    The order is Hugging Face's: penalty, temperature, top-k, top-p, min-p. It draws on the CPU, so that a seed
    gives the same tokens on every device that gives the same logits.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = params.seed if params.seed is not None else secrets.randbelow(2**31)
        self._random = random.Random(self.seed)
        self._draw: Draw | None = None

    def __call__(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """The next id. logits: (vocab_size,) float32; `token_ids` are the prompt's and completion's so far.

        Raises:
            IntegrityError: the highest logit is no finite number: the weights are damaged or the type too narrow.
        """
        on_cpu = logits.float().cpu().contiguous()
        if self.params.repeat_penalty != 1.0:
            on_cpu = penalize(on_cpu, token_ids, self.params.repeat_penalty)
        values = on_cpu.numpy()
        likeliest = int(values.argmax())  # NaN is the maximum wherever it is
        if not math.isfinite(values[likeliest]):
            raise not_a_number()
        if self.params.temperature == 0:
            return likeliest
        highest, inverse = values[likeliest], min(max(1 / self.params.temperature, SMALLEST), LARGEST)
        if self._truncates or logits.device.type != "cpu" or (kernel := self._kernel(len(values))) is None:
            weights = truncate(weighed(values, highest, inverse), self.params)
            return drawn(weights, self._random.random())
        return kernel(on_cpu, highest, inverse, self._random.random())

    @property
    def _truncates(self) -> bool:
        return self.params.top_k > 0 or self.params.top_p < 1 or self.params.min_p > 0

    def _kernel(self, n_logits: int) -> "Draw | None":
        """What draws at once where nothing is left out, if the CPU has its kernels."""
        if self._draw is None or self._draw.n_logits != n_logits:
            made = _draw_kernel()
            self._draw = None if made is None else made(n_logits)
        return self._draw


@functools.cache
def _draw_kernel() -> "type[Draw] | None":
    """None where kernels are turned off, or there is no numba, or not the instructions that were asked for."""
    if os.environ.get("MISTRAL_CLI_KERNELS") == "reference":
        return None
    try:
        from mistralcli.kernels.cpu.sample import Draw
    except ImportError:
        return None
    return Draw


def not_a_number() -> IntegrityError:
    """What is raised where no token can be chosen."""
    return IntegrityError(
        "the model's output is not a number",
        "its weights may be damaged, or its values too large: try --dtype float32 --kv float32",
    )


def penalize(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> torch.Tensor:
    """Make the ids that have occurred less likely: divide positive logits, multiply negative (Keskar et al. 2019).

    What would be infinite by that stays finite.
    """
    seen = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)
    before = logits[seen].double()
    after = torch.where(before > 0, before / penalty, before * penalty)
    after = torch.where(before.isfinite(), after.clamp(-LARGEST, LARGEST), before)
    return logits.index_copy(0, seen, after.to(logits.dtype))


def truncate(weights: Array, params: SamplingParams) -> Array:
    """Put 0 where top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) leave a token out.

    weights: (vocab_size,), what the probabilities are in proportion to, the largest of them 1. The likeliest token
    always stays, and what weighs as much as a token that stays does too.
    """
    if 0 < params.top_k < len(weights):
        weights = _not_below(weights, _kth_largest(weights, params.top_k))
    if params.top_p < 1:
        weights = _not_below(weights, _least_of_nucleus(weights, params.top_p))
    return _not_below(weights, params.min_p) if params.min_p > 0 else weights


def weighed(logits: Array, highest: float, inverse: float) -> Array:
    """What the probabilities are in proportion to: exp of how far logits are below the highest, over the temperature.

    inverse: of the temperature.
    """
    with np.errstate(over="ignore"):  # what is far below may be −∞
        weights = logits - np.float32(highest)
        weights *= np.float32(inverse)
    np.exp(weights, out=weights)
    return weights


def drawn(weights: Array, uniform: float) -> int:
    """The index where the running sum of the weights passes `uniform` (0 ≤ uniform < 1) of their total.

    The sum runs over blocks first, then inside of one.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    block = int(sums.searchsorted(target, side="right"))
    start = block * BLOCK
    inside = weights[start : start + BLOCK].cumsum(dtype=np.float64)
    at = int(inside.searchsorted(target - (sums[block - 1] if block else 0.0), side="right"))
    # Both sums are rounded: where this one ends short of the block's, the last that weighs anything is meant.
    return start + min(at, int(inside.searchsorted(inside[-1])))


def _not_below(weights: Array, least: float) -> Array:
    return np.where(weights < least, 0, weights)


def _kth_largest(weights: Array, k: int) -> float:
    """Sought only among what is not below the k-th largest of the blocks' largest, where there are so many blocks."""
    largest = np.maximum.reduceat(weights, np.arange(0, len(weights), BLOCK))
    if k <= len(largest):
        weights = weights[weights >= np.partition(largest, -k)[-k]]
    return float(np.partition(weights, -k)[-k])


def _least_of_nucleus(weights: Array, top_p: float) -> float:
    """The smallest weight of those that have less than `top_p` of the total before them, the largest first.

    All that is below (1 − top_p) · total / n comes, together, to less than 1 − top_p of the total: it lies behind the
    nucleus, and need not be sorted.
    """
    total = weights.sum(dtype=np.float64)
    near = weights[weights >= (1 - top_p) * total / len(weights)]
    ordered = np.sort(near)[::-1].astype(np.float64)
    before = ordered.cumsum() - ordered
    return float(ordered[before.searchsorted(top_p * total) - 1])
