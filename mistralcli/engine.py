"""Token ids in, token ids out: chunked pre-fill, decoding, and a cache that is kept between calls."""

import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import torch

from mistralcli.cache import DEFAULT_SLACK, KVCache
from mistralcli.device import out_of_memory_as
from mistralcli.errors import ContextOverflowError, NotEnoughMemoryError
from mistralcli.model import Transformer
from mistralcli.prefill import CapturedForward, CapturedPrompts
from mistralcli.sampling import Sampler, not_a_number
from mistralcli.sequences import common_length

if TYPE_CHECKING:
    from mistralcli.cpu_decoder import CpuDecoder
    from mistralcli.decoder import Decoder

FinishReason = Literal["stop", "length"]
ChooseToken = Callable[[torch.Tensor, Sequence[int]], int]
"""A sampler: logits (vocab_size,) and the ids so far to the next id."""

WARM_UP_TOKENS = (160, 2)
"""More rows than the largest tile of a kernel has, and as few as go through the kernels for few rows."""


class Engine:
    """A model with its cache. It knows token ids only.

    `token_ids` is what the cache holds of the first sequence: a prompt that begins with the same ids is
    pre-filled from where it differs.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_seq_len: int,
        chunk: int,
        slack: int = DEFAULT_SLACK,
        n_seqs: int = 1,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """`max_seq_len` positions for each of `n_seqs` sequences; prompts go through in chunks of `chunk` tokens.

        cache_dtype: what `KVCache` takes, the model's own type without it.

        Raises:
            NotEnoughMemoryError: the device has no room for the cache.
        """
        assert chunk >= 1 and slack >= 1 and max_seq_len >= 1
        self.model = model
        self.max_seq_len = max_seq_len
        self.chunk = chunk
        self.device = torch.device(device)
        self.cache = KVCache(
            model.config,
            max_seq_len=max_seq_len,
            n_seqs=n_seqs,
            slack=slack,
            dtype=cache_dtype or model.dtype,
            device=device,
        )
        self.token_ids: list[int] = []
        self.decoder = self._make_decoder()
        self._cpu_decoder = self._make_cpu_decoder()
        self._captured = None if self.decoder is None else CapturedForward(model, self.cache, chunk)
        self._prompts = self._make_prompts()
        if self.decoder is not None:
            self._warm_up(self.decoder)

    def _make_decoder(self) -> "Decoder | None":
        """The captured step, where the device is CUDA and its kernels know the model."""
        if self.device.type != "cuda" or os.environ.get("MISTRAL_CLI_KERNELS") == "reference":
            return None
        try:
            from mistralcli.decoder import Decoder, can_decode
        except ImportError:  # no Triton: the operators say so
            return None
        if not can_decode(self.model, len(self.cache.last)):
            return None
        with out_of_memory_as(f"{self.device} ran out of memory for one step", "ask for a shorter --ctx"):
            return Decoder(self.model, self.cache)

    def _make_cpu_decoder(self) -> "CpuDecoder | None":
        """The step as one program, where the device is the CPU and its kernels know the model."""
        if self.device.type != "cpu" or os.environ.get("MISTRAL_CLI_KERNELS") == "reference":
            return None
        try:
            from mistralcli.cpu_decoder import CpuDecoder, can_decode
        except ImportError:  # no numba, or not these instructions: the operators say so
            return None
        return CpuDecoder(self.model, self.cache) if can_decode(self.model, self.cache) else None

    def _make_prompts(self) -> CapturedPrompts | None:
        """What runs the prompts of single sequences of several, where steps are captured and memory is left for it."""
        if self.decoder is None or len(self.cache.last) == 1:
            return None
        try:
            return CapturedPrompts(self.model, self.cache, self.chunk)
        except NotEnoughMemoryError:
            return None

    def _warm_up(self, decoder: "Decoder") -> None:
        """Compile what a prompt takes besides the captured step now, or load it from Triton's cache."""
        for wanted in WARM_UP_TOKENS:
            token_ids = [0] * min(wanted, self.chunk, self.max_seq_len - 1)
            logits = self._extend(token_ids) if self._prompts is None else self.start({0: token_ids})[0]
            decoder.sampler.sample(logits.expand(len(decoder.token_ids), -1).contiguous(), decoder.token_ids)
            self.cache.rewind(0)
            self.token_ids = []

    def generate(
        self,
        token_ids: Sequence[int],
        choose: ChooseToken,
        *,
        stop_ids: frozenset[int] = frozenset(),
        max_tokens: int | None = None,
    ) -> Generator[int, None, FinishReason]:
        """Yield the completion of the only sequence, id by id; returns why it ended.

        A stop id ends it and is not yielded. Closing the generator, or an exception in the midst of it, leaves
        the cache usable.

        Raises:
            ContextOverflowError: the prompt leaves no room for one token.
        """
        assert len(self.cache.last) == 1, "several sequences go through prefill and step"
        self.require_room(len(token_ids))
        so_far = list(token_ids)
        room = self.max_seq_len - len(so_far)
        logits = self._prefill_new(so_far)
        n_most = room if max_tokens is None else min(room, max_tokens)
        if self.decoder is not None and isinstance(choose, Sampler):
            return (yield from self._generate_on_device(self.decoder, logits, choose, stop_ids, n_most))
        for n_left in range(n_most, 0, -1):
            token_id = choose(logits, so_far)
            if token_id in stop_ids:
                return "stop"
            so_far.append(token_id)
            yield token_id
            if n_left > 1:
                logits = self._extend([token_id])
        return "length"

    def _generate_on_device(
        self,
        decoder: "Decoder",
        logits: torch.Tensor,
        sampler: Sampler,
        stop_ids: frozenset[int],
        n_most: int,
    ) -> Generator[int, None, FinishReason]:
        """`generate` behind the pre-fill: a step is under way while the id before it is read.

        So the cache may hold an id more than was yielded, such as the one that ended the completion; `token_ids`
        says so, and the next prompt rewinds it.
        """
        decoder.choose_first(0, logits, sampler.params, sampler.seed, self.token_ids)
        reading = decoder.read()
        for n_left in range(n_most, 0, -1):
            this = reading
            if n_left > 1:
                decoder.step()
                reading = decoder.read()
            token_id = this.wait()[0]
            if token_id < 0:
                raise not_a_number()
            if n_left > 1:
                self.token_ids.append(token_id)
            if token_id in stop_ids:
                return "stop"
            yield token_id
        return "length"

    def require_room(self, n_tokens: int) -> None:
        """Raise ContextOverflowError, with the numbers, unless a prompt leaves room for one token."""
        if n_tokens >= self.max_seq_len:
            can_be_longer = self.max_seq_len < self.model.config.max_seq_len
            raise ContextOverflowError(
                f"the prompt has {n_tokens} tokens, and a context of {self.max_seq_len} leaves no room for an answer",
                f"shorten it by {n_tokens - self.max_seq_len + 1} tokens or more"
                + (", or ask for a longer --ctx" if can_be_longer else ""),
            )
        assert n_tokens >= 1, "an empty prompt has no next token"

    def n_reusable(self, token_ids: Sequence[int]) -> int:
        """How many leading ids of a prompt are in the cache and can stay; the last id is always run again."""
        n_common = common_length(self.token_ids, token_ids[:-1])
        return n_common if self.cache.can_rewind(n_common) else 0

    def fill(self, token_ids: Sequence[int]) -> None:
        """Have the cache hold these ids of the only sequence, and nothing else. Raises ContextOverflowError."""
        self.require_room(len(token_ids))
        self._prefill_new(list(token_ids))

    def _prefill_new(self, token_ids: list[int]) -> torch.Tensor:
        """Run what the cache does not hold yet, and return the logits after the last id: (vocab_size,)."""
        n_done = self.n_reusable(token_ids)
        self.cache.rewind(n_done)
        del self.token_ids[n_done:]
        while n_done < len(token_ids):
            logits = self._extend(token_ids[n_done : n_done + self.chunk])
            n_done = len(self.token_ids)
        return logits

    def _extend(self, token_ids: list[int]) -> torch.Tensor:
        """Append ids to the only sequence; logits after the last: (vocab_size,)."""
        start, logits = len(self.token_ids), None
        if self.decoder is not None and len(token_ids) == 1:
            logits = self.decoder.feed(token_ids)[0]
        elif self._cpu_decoder is not None and self._cpu_decoder.takes(
            len(token_ids), start + len(token_ids)
        ):
            logits = self._cpu_decoder.append({0: token_ids})[0]
        if logits is not None:
            self.token_ids.extend(token_ids)
            return logits
        positions = torch.arange(start, start + len(token_ids))[None]
        hidden = self._forward(torch.tensor([token_ids]), positions)
        self.token_ids.extend(token_ids)
        return self._logits(hidden[0, -1])

    @torch.no_grad()
    def _forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Hidden states (n_seqs, n_tokens, dim) of a chunk on the CPU, valid until the next call.

        cache: that of one sequence, instead of the engine's.
        """
        with self._memory_for(int(positions.max()) + 1):
            if cache is None and self._captured is not None:
                return self._captured(token_ids, positions)
            hidden: torch.Tensor = self.model(token_ids.to(self.device), positions, cache or self.cache)
        return hidden

    def _memory_for(self, n_positions: int) -> AbstractContextManager[None]:
        return out_of_memory_as(
            f"{self.device} ran out of memory with {n_positions} positions in the cache",
            "ask for a shorter --ctx or a smaller --chunk, or close other programs",
        )

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start afresh with one prompt for each sequence, of any lengths; logits after each: (n_seqs, vocab_size).

        Raises:
            ContextOverflowError: a prompt leaves no room for one token.
        """
        assert len(prompts) == len(self.cache.last), (
            f"{len(prompts)} prompts for {len(self.cache.last)} sequences"
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        for n_tokens in lengths.tolist():
            self.require_room(n_tokens)
        self.cache.rewind(0)
        self.token_ids = []
        last_hidden: list[torch.Tensor | None] = [None] * len(prompts)
        for start in range(0, int(lengths.max()), self.chunk):
            stop = min(start + self.chunk, int(lengths.max()))
            positions = torch.arange(start, stop).repeat(len(prompts), 1)
            positions = positions.masked_fill(positions >= lengths[:, None], -1)
            hidden = self._forward(_padded(prompts, start, stop), positions)
            for i, n_tokens in enumerate(lengths.tolist()):
                if start < n_tokens <= stop:
                    last_hidden[i] = hidden[i, n_tokens - 1 - start].clone()
        return self._logits(torch.stack([row for row in last_hidden if row is not None]))

    def start(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Begin sequences afresh, each with the prompt of its index, the others left where they are.

        Returns the logits after each prompt, (vocab_size,).

        Raises:
            ContextOverflowError: a prompt leaves no room for one token.
        """
        for token_ids in prompts.values():
            self.require_room(len(token_ids))
        self.token_ids = []
        logits, together = {}, {}
        for index, token_ids in prompts.items():
            if self._cpu_decoder is not None and self._cpu_decoder.takes(len(token_ids), len(token_ids)):
                self.cache.last[index] = -1
                together[index] = token_ids
            else:
                logits[index] = self._start_alone(index, token_ids)
        if self._cpu_decoder is not None and together:
            logits |= zip(together, self._cpu_decoder.append(together).clone(), strict=True)
        return logits

    @torch.no_grad()
    def _start_alone(self, index: int, token_ids: Sequence[int]) -> torch.Tensor:
        """`start` of one sequence by the model's forward pass, captured where it can be."""
        if self._prompts is not None and len(token_ids) <= self._prompts.most_tokens:
            with self._memory_for(len(token_ids)):
                return self._logits(self._prompts(index, token_ids))
        is_only = len(self.cache.last) == 1
        one = self.cache.sequence(index, len(token_ids))
        cache = None if is_only and self._captured is not None else one
        for start in range(0, len(token_ids), self.chunk):
            part = torch.tensor([token_ids[start : start + self.chunk]])
            positions = torch.arange(start, start + part.shape[1])[None]
            hidden = self._forward(part, positions, cache)
        return self._logits(hidden[0, -1])

    def step(self, token_ids: Sequence[int], idle: Collection[int] = ()) -> torch.Tensor:
        """Append one id to each sequence; logits after it: (n_seqs, vocab_size), valid until the next call.

        idle: sequences that are not going on, by index; their ids and logits mean nothing, and what the cache holds of
        them is lost.

        Raises:
            ContextOverflowError: a sequence fills the context already.
        """
        self.cache.last[list(idle)] = 0  # the least to attend to
        positions = (self.cache.last + 1)[:, None]
        if int(positions.max()) >= self.max_seq_len:
            raise ContextOverflowError(
                f"a sequence fills the context of {self.max_seq_len} positions", "ask for a longer --ctx"
            )
        if self.decoder is not None:
            return self.decoder.feed(token_ids).clone()
        if self._cpu_decoder is not None:
            going_on = {index: [one] for index, one in enumerate(token_ids) if index not in idle}
            logits = self._cpu_decoder.append(going_on)
            return logits if not idle else _spread(logits, list(going_on), len(token_ids))
        hidden = self._forward(torch.tensor(token_ids)[:, None], positions.cpu())
        return self._logits(hidden[:, 0])


def _spread(rows: torch.Tensor, places: Sequence[int], n_rows: int) -> torch.Tensor:
    """Rows at their places among n_rows, zeros elsewhere."""
    return rows.new_zeros(n_rows, rows.shape[1]).index_copy_(0, torch.tensor(places), rows)


def _padded(prompts: Sequence[Sequence[int]], start: int, stop: int) -> torch.Tensor:
    """Columns start … stop of the prompts, short ones filled with id 0: (n_seqs, stop − start)."""
    rows = [list(prompt[start:stop]) for prompt in prompts]
    return torch.tensor([row + [0] * (stop - start - len(row)) for row in rows])
