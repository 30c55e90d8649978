"""From logits to the next ids on the device, in Triton: what `mistralcli.sampling` does, without a wait for the host.

Two launches. The first goes over the vocabulary in many programs: mask, penalty, and of each chunk of tokens its
likeliest and one drawn from it. The second, one program for each sequence, takes the likeliest or the drawn of all
chunks. Only where top-k, top-p or min-p is set does it read logits again: it gathers those that can matter and finds
the least one kept by bisection on their bits, since sorting is slow here.

A draw is the token with the greatest sum of logit and Gumbel noise (Maddison et al. 2014): the best of any part of the
vocabulary is a draw from that part. The noise is Philox's (Salmon et al. 2011) of the seed and (id, draw), so it needs
no state but the number of the draw, and neither truncation nor the sequences beside it change it.
"""

import math
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl

CHUNK = 1024  # 128 programs for a vocabulary of 131,072, one to a multiprocessor
BLOCK = 4096
LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-30, 1e30  # between them 1 / temperature is a normal float32
NEAR = tl.constexpr(10.0)
"""Tokens within e⁻¹⁰ of the likeliest are gathered first. They nearly always hold what truncation keeps, and are a few
hundred of a trained model's vocabulary; where they do not, all are gathered."""


class Params(Protocol):
    """What is read of `mistralcli.run_options.SamplingParams`, which is above the kernels."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repeat_penalty(self) -> float: ...


class DeviceSampler:
    """A seeded chooser of the next ids of `n_seqs` sequences, whose parameters and state are on the device.

    Each sequence has its own, and one captured graph of `sample` serves all. Beside `mistralcli.sampling.Sampler`:
    - it computes in float32: a token whose mass or logit is within 1e-5 of a bound may fall on its other side;
    - top-p keeps all tokens equal to the least likely one kept, where sorting takes as many as are needed;
    - a seed gives other tokens, the same ones in whichever sequence.

    `seen` (n_seqs, vocab_size) uint8 has 1 for ids that have occurred. `least` (n_seqs,) float32 is, where a draw was
    truncated, the least logit after the penalty that was kept.
    """

    def __init__(self, n_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        """Greedy until `set` is called."""
        self.vocab_size = vocab_size
        self.seen = torch.zeros(n_seqs, vocab_size, dtype=torch.uint8, device=device)
        self.least = torch.full((n_seqs,), -math.inf, device=device)
        n_chunks = triton.cdiv(vocab_size, CHUNK)
        self._allowed = torch.zeros(n_seqs, triton.cdiv(vocab_size, 32), dtype=torch.int32, device=device)
        self._is_masked = torch.zeros(1, dtype=torch.int32, device=device)
        # Of each sequence: temperature, top_p, log(min_p), repeat_penalty; seed, top_k.
        self._floats = torch.tensor([0.0, 1.0, -math.inf, 1.0], device=device).repeat(n_seqs, 1)
        self._ints = torch.zeros(n_seqs, 2, dtype=torch.int64, device=device)
        self._n_draws = torch.zeros(n_seqs, dtype=torch.int32, device=device)
        # Of each chunk: largest logit, mass relative to it, largest logit with noise; the ids of the two largest.
        self._chunk_floats = torch.empty(n_seqs, 3, n_chunks, device=device)
        self._chunk_ids = torch.empty(n_seqs, 2, n_chunks, dtype=torch.int32, device=device)
        self._adjusted = torch.empty(n_seqs, vocab_size, device=device)
        self._near = torch.empty(n_seqs, vocab_size, device=device)
        self._near_ids = torch.empty(n_seqs, vocab_size, dtype=torch.int32, device=device)

    def set(self, params: Params, seed: int, seen_ids: Sequence[Sequence[int]] | None) -> None:
        """`set_sequence` of all sequences, which draw alike; `seen_ids`: those of each, the first sequence first."""
        for index, ids in zip(range(len(self.seen)), seen_ids or [()] * len(self.seen), strict=True):
            self.set_sequence(index, params, seed, ids)

    def set_sequence(self, index: int, params: Params, seed: int, seen_ids: Collection[int]) -> None:
        """Begin a sequence anew with these parameters: draw 0 of `seed`, and the ids that it has so far.

        A temperature that is not 0 is taken as at least 1e-30 and at most 1e30. A mask stays as it is. Nothing here
        waits for the device.
        """
        temperature = params.temperature
        if temperature > 0:
            temperature = min(max(temperature, LEAST_TEMPERATURE), GREATEST_TEMPERATURE)
        top_p = max(params.top_p, 1e-30)
        log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        floats = torch.tensor([temperature, top_p, log_min_p, params.repeat_penalty])
        self._floats[index].copy_(floats, non_blocking=True)
        self._ints[index].copy_(torch.tensor([seed, top_k]), non_blocking=True)
        self._n_draws[index].zero_()
        ids = torch.tensor(sorted(set(seen_ids)), dtype=torch.int64)
        self.seen[index].zero_().index_fill_(0, ids.to(self.seen.device, non_blocking=True), 1)

    def allow(self, mask: torch.Tensor | None) -> None:
        """Draw only the ids whose bit is set, from the next draw on; None allows all.

        mask: (n_seqs, ceil(vocab_size / 32)) int32; an id is bit `id % 32` of word `id // 32`. It is copied.
        """
        self._is_masked.fill_(mask is not None)
        if mask is not None:
            self._allowed.copy_(mask)

    def sample(
        self, logits: torch.Tensor, token_ids: torch.Tensor, *, first: int = 0, pdl: bool = False
    ) -> None:
        """Choose from logits (n, vocab_size) float32 into token_ids (n_seqs,) int64, and mark the ids as seen.

        The rows belong to the sequences from `first` on; those of others stay as they are. Of logits with a NaN or
        +∞, and where no finite one is allowed, the id is −1. With `pdl` the launch may overlap the one before it. Can
        be captured.
        """
        n_chunks = self._chunk_ids.shape[2]
        n, vocab_size = logits.shape
        assert vocab_size == self.vocab_size and logits.dtype == torch.float32 and logits.is_contiguous()
        assert first >= 0 and first + n <= len(self.seen)
        assert token_ids.shape == (len(self.seen),) and token_ids.dtype == torch.int64
        options = {"launch_pdl": True} if pdl else {}
        _adjust_kernel[(n, n_chunks)](
            logits,
            self.seen,
            self._allowed,
            self._is_masked,
            self._floats,
            self._ints,
            self._n_draws,
            self._adjusted,
            self._chunk_floats,
            self._chunk_ids,
            first,
            self.vocab_size,
            CHUNK=CHUNK,
            PDL=pdl,
            num_warps=4,
            **options,
        )
        _choose_kernel[(n,)](
            self._adjusted,
            self._chunk_floats,
            self._chunk_ids,
            self._floats,
            self._ints,
            self._n_draws,
            self._near,
            self._near_ids,
            self.least,
            self.seen,
            token_ids,
            first,
            self.vocab_size,
            n_chunks,
            CHUNKS=triton.next_power_of_2(n_chunks),
            BLOCK=BLOCK,
            PDL=pdl,
            num_warps=16,
            **options,
        )


@triton.jit(do_not_specialize=["first"])
def _adjust_kernel(
    logits,
    seen,
    allowed,
    is_masked,
    floats,
    ints,
    n_draws,
    adjusted,
    chunk_floats,
    chunk_ids,
    first,
    vocab_size,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mask and penalty; the likeliest and a drawn token of a chunk."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = first + tl.program_id(0)
    chunk = tl.program_id(1)
    n_chunks = tl.num_programs(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    in_vocab = ids < vocab_size
    at = sequence * vocab_size + ids
    x = tl.load(logits + tl.program_id(0) * vocab_size + ids, mask=in_vocab, other=-float("inf"))
    is_damaged = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0)
    if tl.load(is_masked) != 0:
        words = tl.load(allowed + sequence * tl.cdiv(vocab_size, 32) + ids // 32, mask=in_vocab, other=0)
        x = tl.where((words >> (ids % 32)) & 1 != 0, x, -float("inf"))
    floats += sequence * 4
    penalty = tl.load(floats + 3)
    if penalty != 1.0:
        penalized = tl.where(x > 0, x / penalty, x * penalty)
        penalized = tl.minimum(penalized, 3.4028234e38)  # an infinity of our own is no damage
        x = tl.where(tl.load(seen + at, mask=in_vocab, other=0) != 0, penalized, x)
    x = tl.where(x == 0, 0.0, x)  # −0 is 0, also by its bits
    largest, likeliest = tl.max(x, axis=0, return_indices=True)
    chunk_floats += sequence * 3 * n_chunks + chunk
    chunk_ids += sequence * 2 * n_chunks + chunk
    tl.store(chunk_floats, tl.where(is_damaged != 0, float("inf"), largest))
    tl.store(chunk_ids, chunk * CHUNK + likeliest)
    temperature = tl.load(floats)
    if temperature > 0:
        tl.store(adjusted + at, x, mask=in_vocab)
        # Relative to the chunk's own largest, no temperature makes an infinity; a chunk may have none that is finite.
        scaled = (x - tl.where(largest == -float("inf"), 0.0, largest)) / temperature
        noise = _gumbel(tl.load(ints + sequence * 2), ids, tl.load(n_draws + sequence))
        score, drawn = tl.max(scaled + noise, axis=0, return_indices=True)
        tl.store(chunk_floats + n_chunks, tl.sum(tl.exp(scaled), axis=0))
        tl.store(chunk_floats + 2 * n_chunks, score)
        tl.store(chunk_ids + n_chunks, chunk * CHUNK + drawn)


@triton.jit(do_not_specialize=["first"])
def _choose_kernel(
    adjusted,
    chunk_floats,
    chunk_ids,
    floats,
    ints,
    n_draws,
    near,
    near_ids,
    least,
    seen,
    token_ids,
    first,
    vocab_size,
    n_chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The likeliest or the drawn token of all chunks, or one drawn from those that truncation keeps."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = first + tl.program_id(0)
    floats += sequence * 4
    ints += sequence * 2
    temperature, top_p = tl.load(floats), tl.load(floats + 1)
    log_min_p, top_k = tl.load(floats + 2), tl.load(ints + 1).to(tl.int32)
    n_draw = tl.load(n_draws + sequence)
    chunk = tl.arange(0, CHUNKS)
    in_row = chunk < n_chunks
    chunk_floats += sequence * 3 * n_chunks + chunk
    chunk_ids += sequence * 2 * n_chunks
    maxima = tl.load(chunk_floats, mask=in_row, other=-float("inf"))
    largest, likeliest = tl.max(maxima, axis=0, return_indices=True)
    token_id = tl.full((), -1, tl.int32)
    if (largest > -float("inf")) & (largest < float("inf")):
        if temperature == 0:
            token_id = tl.load(chunk_ids + likeliest)
        elif (top_k > 0) | (top_p < 1) | (log_min_p > -float("inf")):
            masses = tl.load(chunk_floats + n_chunks, mask=in_row, other=0.0)
            mass = tl.sum(masses * tl.exp((maxima - largest) / temperature), axis=0)
            row = sequence * vocab_size
            near += row
            near_ids += row
            n_near, floor = _gather(
                adjusted + row, near, near_ids, vocab_size,
                largest, temperature, top_k, top_p, log_min_p, mass, BLOCK,
            )  # fmt: skip
            kept = _least(near, n_near, floor, largest, temperature, top_k, top_p, mass, BLOCK)
            kept = tl.maximum(kept, largest + temperature * log_min_p)
            tl.store(least + sequence, kept)
            token_id = _draw(near, near_ids, n_near, kept, largest, temperature, tl.load(ints), n_draw, BLOCK)
        else:
            scores = tl.load(chunk_floats + 2 * n_chunks, mask=in_row, other=-float("inf"))
            best = tl.argmax(scores + (maxima - largest) / temperature, axis=0)
            token_id = tl.load(chunk_ids + n_chunks + best)
        tl.store(seen + sequence * vocab_size + token_id, 1)
    tl.store(token_ids + sequence, token_id)
    tl.store(n_draws + sequence, n_draw + 1)


@triton.jit
def _gather(
    adjusted, near, near_ids, vocab_size, largest, temperature, top_k, top_p, log_min_p, mass, BLOCK: tl.constexpr
):  # fmt: skip
    """Collect the logits that truncation may keep, in order of id: how many they are, and a bound below them.

    Those near the largest are enough if they are k; without top-k, if they have the mass p; without top-p, if min-p
    keeps no others. Else all are collected.
    """
    floor = largest - NEAR * temperature
    n_near, near_mass = _gather_from(floor, adjusted, near, near_ids, vocab_size, largest, temperature, BLOCK)
    is_enough = near_mass >= top_p * mass
    if top_k > 0:
        is_enough = n_near >= top_k
    elif top_p >= 1:
        is_enough = largest + temperature * log_min_p >= floor
    if not is_enough:
        tl.debug_barrier()
        floor = -float("inf")
        n_near, _ = _gather_from(floor, adjusted, near, near_ids, vocab_size, largest, temperature, BLOCK)
    tl.debug_barrier()  # what one thread has stored the others read
    return n_near, floor


@triton.jit
def _gather_from(
    floor, adjusted, near, near_ids, vocab_size, largest, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """Collect the logits from `floor` on: their number and mass."""
    offsets = tl.arange(0, BLOCK)
    n_near = 0
    masses = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + offsets
        x = tl.load(adjusted + ids, mask=ids < vocab_size, other=-float("inf"))
        is_near = (x >= floor) & (ids < vocab_size)
        place = tl.cumsum(is_near.to(tl.int32), axis=0)
        tl.store(near + n_near + place - 1, x, mask=is_near)
        tl.store(near_ids + n_near + place - 1, ids, mask=is_near)
        masses += tl.where(is_near, tl.exp((x - largest) / temperature), 0.0)
        n_near += tl.max(place, axis=0)
    return n_near, tl.sum(masses, axis=0)


@triton.jit
def _least(near, n_near, floor, largest, temperature, top_k, top_p, mass, BLOCK: tl.constexpr):
    """The least logit that top-k and then top-p keep, or a bound below all; `mass` is that of the vocabulary.

    Each bisection halves a range of 32-bit keys, so it takes at most 32 passes over the gathered logits, and about 25
    where they have one sign.
    """
    low = _key(floor).to(tl.int64)  # a sum of two keys can exceed 32 bits
    if top_k > 0:
        high = _key(largest).to(tl.int64)
        while low < high:  # the greatest key that k tokens reach
            middle = (low + high + 1) >> 1
            n_from, _ = _from(middle.to(tl.int32), near, n_near, largest, temperature, BLOCK)
            if n_from >= top_k:
                low = middle
            else:
                high = middle - 1
        _, mass = _from(low.to(tl.int32), near, n_near, largest, temperature, BLOCK)
    if top_p < 1:
        high = _key(largest).to(tl.int64)
        while low < high:  # the least key such that the mass above it is less than p
            middle = (low + high) >> 1
            _, above = _from((middle + 1).to(tl.int32), near, n_near, largest, temperature, BLOCK)
            if above < top_p * mass:
                high = middle
            else:
                low = middle + 1
    return _value(low.to(tl.int32))


@triton.jit
def _from(key, near, n_near, largest, temperature, BLOCK: tl.constexpr):
    """Number and mass, relative to the largest, of the gathered logits whose keys are `key` or more."""
    offsets = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n_near, BLOCK):
        x = tl.load(near + begin + offsets, mask=begin + offsets < n_near, other=-float("inf"))
        is_in = (_key(x) >= key) & (begin + offsets < n_near)
        counts += is_in.to(tl.int32)
        masses += tl.where(is_in, tl.exp((x - largest) / temperature), 0.0)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _draw(near, near_ids, n_near, kept, largest, temperature, seed, n_draw, BLOCK: tl.constexpr):
    """The id of one of the gathered logits from `kept` on."""
    offsets = tl.arange(0, BLOCK)
    best = -float("inf")
    token_id = -1
    for begin in range(0, n_near, BLOCK):
        in_range = begin + offsets < n_near
        x = tl.load(near + begin + offsets, mask=in_range, other=-float("inf"))
        ids = tl.load(near_ids + begin + offsets, mask=in_range, other=0)
        scores = (x - largest) / temperature + _gumbel(seed, ids, n_draw)
        score, place = tl.max(tl.where(x >= kept, scores, -float("inf")), axis=0, return_indices=True)
        if score > best:
            best = score
            token_id = tl.load(near_ids + begin + place)
    return token_id


@triton.jit
def _gumbel(seed, ids, n_draw):
    """Standard Gumbel noise −log(e), with e = −log(1 − u) exponential.

    A rare token wins by a small e, which is a small u: there float32 is fine, and 1 − u is not. Never infinite: u is
    at least 2⁻³³ and below 1.
    """
    ids = ids.to(tl.uint32)
    zeros = ids * 0
    bits, _, _, _ = tl.philox(seed, ids, zeros + n_draw.to(tl.uint32), zeros, zeros)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    exponential = tl.where(u < 0.015625, u * (1 + u * (0.5 + u * 0.33333333)), -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit
def _key(x):
    """The bits of float32 as int32 in the same order: those of negative numbers, but for the sign, turned over."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
