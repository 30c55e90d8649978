"""Log-probabilities of a completion's tokens, as the model gave them: before temperature, truncation or a grammar."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mistralcli.engine import ChooseToken


@dataclass(frozen=True)
class TokenLogprob:
    """`logprob` of the token that was chosen, in nats; `top`: the likeliest ids with theirs, the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Recorder:
    """Keeps the log-probabilities of the tokens that a chooser takes, in `tokens`; that of a stop id too.

    `n_top`: how many of the likeliest tokens are kept beside the chosen one.
    """

    def __init__(self, n_top: int) -> None:
        self._n_top = n_top
        self.tokens: list[TokenLogprob] = []

    def around(self, choose: ChooseToken) -> ChooseToken:
        """The same chooser, recorded."""

        def recorded(logits: torch.Tensor, token_ids: Sequence[int]) -> int:
            token_id = choose(logits, token_ids)
            logprobs = logits.float().cpu().log_softmax(-1)
            values, ids = logprobs.topk(min(self._n_top, len(logprobs)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            self.tokens.append(TokenLogprob(token_id, float(logprobs[token_id]), top))
            return token_id

        return recorded
