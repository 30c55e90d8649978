"""Many completions together: all sequences of the engine are decoded at once; the next prompt replaces what has ended.

A step reads the weights once for all sequences, which is what decoding costs; so eight together take little longer than
one. Where steps are captured, the device chooses the ids too, and they are read a step behind it. Where `CpuDecoder`
takes the model, an answer is the same, to the last bit, however many are decoded together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch

from mistralcli.engine import ChooseToken, Engine, FinishReason
from mistralcli.errors import MistralError
from mistralcli.run_options import SamplingParams
from mistralcli.sampling import Sampler, not_a_number
from mistralcli.session import Session, StopScanner

if TYPE_CHECKING:
    from mistralcli.decoder import Decoder


@dataclass(frozen=True)
class Job:
    """A prompt, and how it is to be completed; as `Session.complete` takes it. `index` names it."""

    index: int
    token_ids: Sequence[int]
    params: SamplingParams
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    through: Sequence[Callable[[ChooseToken], ChooseToken]] = ()


@dataclass
class Answer:
    """What a job came to: its text, or the error that ended it."""

    index: int
    n_prompt: int
    seed: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: MistralError | None = None


def complete_all(session: Session, jobs: Iterable[Job]) -> Iterator[Answer]:
    """The answers to all jobs, each as soon as it is whole, in whatever order that is.

    The next job is taken when a sequence is free. One that fails has its error in its answer, and no other is touched.
    """
    engine = session.engine
    n_seqs = len(engine.cache.last)
    waiting = iter(jobs)
    running: dict[int, _Running] = {}
    while True:
        free = [index for index in range(n_seqs) if index not in running]
        while free and (next_jobs := list(islice(waiting, len(free)))):
            begun = {index: _Running(session, job) for index, job in zip(free, next_jobs, strict=False)}
            _begin(engine, begun)
            yield from (one.answer for one in begun.values() if one.has_ended)
            running |= {index: one for index, one in begun.items() if not one.has_ended}
            free = [index for index in free if index not in running]
        if not running:
            return
        idle = [index for index in range(n_seqs) if index not in running]
        if engine.decoder is None:
            _advance(engine, running, idle)
        else:
            _advance_on_device(engine.decoder, running, idle)
        for index in [index for index, one in running.items() if one.has_ended]:
            yield running.pop(index).answer


def _begin(engine: Engine, begun: Mapping[int, "_Running"]) -> None:
    """Run the prompts of some sequences, together where the engine does it so, and choose their first ids."""
    for one in begun.values():
        try:
            engine.require_room(len(one.token_ids))
        except MistralError as error:
            one.answer.error = error
    fitting = {index: one for index, one in begun.items() if not one.has_ended}
    try:
        logits = engine.start({index: one.token_ids for index, one in fitting.items()})
    except MistralError as error:
        for one in fitting.values():
            one.answer.error = error
    else:
        for index, one in fitting.items():
            if engine.decoder is None or one.sampler is None or one.n_left <= 0:
                one.take(logits[index])
            else:
                params, seed = one.sampler.params, one.sampler.seed
                engine.decoder.choose_first(index, logits[index], params, seed, one.token_ids)


def _advance(engine: Engine, running: Mapping[int, "_Running"], idle: Sequence[int]) -> None:
    """Append the last ids, and choose those that follow."""
    ids = [0] * (len(running) + len(idle))
    for index, one in running.items():
        ids[index] = one.last_id
    logits = engine.step(ids, idle)
    for index, one in running.items():
        one.take(logits[index])


def _advance_on_device(decoder: "Decoder", running: Mapping[int, "_Running"], idle: Sequence[int]) -> None:
    """`_advance` where the device chooses ids: the step behind them is under way while they are read.

    So a sequence may go a step too far, whose id is not read. What has more than a sampler chooses here, by the logits
    of the step; only for that are they waited for.
    """
    chosen_here = {index: one for index, one in running.items() if one.sampler is None}
    reading = decoder.read()
    if chosen_here or any(one.n_left > 1 for one in running.values()):
        decoder.rest(idle)
        if chosen_here:
            decoder.put({index: one.last_id for index, one in chosen_here.items()})
        decoder.step()
    ids = reading.wait()
    for index, one in running.items():
        if index not in chosen_here:
            one.accept(ids[index])
    for index, one in chosen_here.items():
        one.take(decoder.logits[index])


class _Running:
    """One sequence on its way: `token_ids` are all so far, `last_id` is the id that the next step appends.

    `sampler` chooses its ids, if nothing stands around it.
    """

    def __init__(self, session: Session, job: Job) -> None:
        sampler = Sampler(job.params)
        self.sampler = None if job.through else sampler
        self._choose: ChooseToken = sampler
        for wrap in job.through:
            self._choose = wrap(self._choose)
        self.answer = Answer(job.index, len(job.token_ids), sampler.seed)
        self.last_id = 0
        self.token_ids = list(job.token_ids)
        self._decoder = session.tokenizer.stream(continues_text=bool(job.through))
        self._scanner = StopScanner(job.stop)
        self._stop_ids = session.stop_ids
        room = session.max_seq_len - len(job.token_ids)
        self._n_most = room if job.max_tokens is None else min(room, job.max_tokens)

    @property
    def has_ended(self) -> bool:
        return self.answer.finish_reason is not None or self.answer.error is not None

    @property
    def n_left(self) -> int:
        """Ids that may still be chosen."""
        return self._n_most - len(self.answer.token_ids)

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next id by its logits (vocab_size,), and notice when that was the last."""
        if self.n_left <= 0:
            return self._end("length")
        try:
            token_id = self._choose(logits, self.token_ids)
        except MistralError as error:
            self.answer.error = error
            return None
        return self.accept(token_id)

    def accept(self, token_id: int) -> None:
        """Go on by an id that was chosen, or end; a negative one says that none could be."""
        if token_id < 0:
            self.answer.error = not_a_number()
            return None
        self.last_id = token_id
        if token_id in self._stop_ids:
            return self._end("stop")
        self.token_ids.append(token_id)
        self.answer.token_ids.append(token_id)
        self.answer.text += self._scanner.push(self._decoder.push(token_id))
        if self._scanner.stopped:
            return self._end("stop")
        return self._end("length") if self.n_left <= 0 else None

    def _end(self, reason: FinishReason) -> None:
        self.answer.text += self._scanner.push(self._decoder.flush()) + self._scanner.flush()
        self.answer.finish_reason = "stop" if self._scanner.stopped else reason
