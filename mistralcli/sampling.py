"""From logits to the next token id: temperature, top-k, top-p, min-p, repetition penalty, seed."""

import math
import secrets
from collections.abc import Sequence

import torch

from mistralcli.errors import IntegrityError
from mistralcli.run_options import SamplingParams as SamplingParams


class Sampler:
    """A seeded chooser of tokens: call it with logits and the ids so far.

    The order is Hugging Face's: penalty, temperature, top-k, top-p, min-p. It draws on the CPU, so that a seed
    gives the same tokens on every device that gives the same logits.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = params.seed if params.seed is not None else secrets.randbelow(2**31)
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """The next id. logits: (vocab_size,) float32; `token_ids` are the prompt's and completion's so far.

        Raises:
            IntegrityError: the highest logit is no finite number: the weights are damaged or the type too narrow.
        """
        # In float64 no temperature and no penalty makes a logit infinite that is not.
        logits = logits.double().cpu()
        if not logits.max().isfinite():  # NaN is the maximum wherever it is
            raise not_a_number()
        if self.params.repeat_penalty != 1.0:
            logits = penalize(logits, token_ids, self.params.repeat_penalty)
        if self.params.temperature == 0:
            return int(logits.argmax())
        scaled = (logits - logits.max()) / self.params.temperature
        probabilities = truncate(scaled, self.params).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def not_a_number() -> IntegrityError:
    """What is raised where no token can be chosen."""
    return IntegrityError(
        "the model's output is not a number",
        "its weights may be damaged, or its values too large: try --dtype float32 --kv float32",
    )


def penalize(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> torch.Tensor:
    """Make the ids that have occurred less likely: divide positive logits, multiply negative (Keskar et al. 2019)."""
    seen = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def truncate(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Put −inf where top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) leave a token out.

    The likeliest token always stays. logits: (vocab_size,).
    """
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
        logits = logits.index_fill(0, order[before >= params.top_p], -math.inf)
    if params.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(params.min_p), -math.inf)
    return logits
