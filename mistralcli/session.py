"""A session joins tokenizer and engine: text in, text out. `run`, `chat` and `eval` stand on it."""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mistralcli.config import ModelConfig, read_config
from mistralcli.conversation import Conversation
from mistralcli.device import (
    cap_memory,
    choose_device,
    choose_dtype,
    default_chunk,
    out_of_memory_as,
    room_bytes,
    taken_bytes,
)
from mistralcli.engine import ChooseToken, Engine, FinishReason
from mistralcli.errors import NotEnoughMemoryError, UsageError
from mistralcli.inventory import stored_scheme
from mistralcli.plan import (
    Demand,
    MemoryPlan,
    choose_cache_dtype,
    default_ctx,
    default_slack,
    demand_of,
    fitting_plan,
    requested_plan,
)
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.sampling import Sampler
from mistralcli.threads import set_threads
from mistralcli.tokenizer import StreamDecoder, Tokenizer, load_fitting_tokenizer
from mistralcli.units import size_text
from mistralcli.weights import OnProgress, load_kernels, load_model, loaded_sizes

_COMPILING = {
    "cuda": ("compiling kernels for this GPU, which is done once and kept", 2.0),
    "cpu": ("getting kernels for this CPU, which are compiled once and kept", 1.0),
}
"""What is said when that takes longer than so many seconds. Kernels that are kept take 0.02 s, but on a busy CPU that
and the cache's memory can take as long as compiling on a free one, so the words are true of both."""


@dataclass(frozen=True)
class Timings:
    """Seconds from the call to the first token, and from there to the last."""

    prefill_s: float = 0.0
    decode_s: float = 0.0


class Completion:
    """One answer: iterate over it for its text, piece by piece; its attributes say how it goes.

    `finish_reason` is None before the first piece and "interrupted" until the end is reached, so that is what
    it stays when the iteration is closed or breaks off. `n_cached` counts the prompt's tokens that were found
    in the cache. `text` and `token_ids` grow as pieces come.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        ids: Generator[int, None, FinishReason],
        decoder: StreamDecoder,
        scanner: "StopScanner",
        *,
        n_cached: int,
        seed: int,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.n_cached = n_cached
        self.seed = seed
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | Literal["interrupted"] | None = None
        self.timings = Timings()
        self._pieces = self._stream(ids, decoder, scanner)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop generating; what has come stays."""
        self._pieces.close()

    @property
    def n_prompt(self) -> int:
        return len(self.prompt_ids)

    def _stream(
        self, ids: Generator[int, None, FinishReason], decoder: StreamDecoder, scanner: "StopScanner"
    ) -> Generator[str, None, None]:
        self.finish_reason = "interrupted"
        with contextlib.closing(ids):
            end = yield from self._until_stop(ids, decoder, scanner)
        rest = scanner.push(decoder.flush()) + scanner.flush()
        if rest:
            yield rest
        self.finish_reason = "stop" if scanner.stopped else end

    def _until_stop(
        self, ids: Generator[int, None, FinishReason], decoder: StreamDecoder, scanner: "StopScanner"
    ) -> Generator[str, None, FinishReason]:
        clock = _Clock()
        while True:
            try:
                token_id = next(ids)
            except StopIteration as end:
                self.timings = clock.read()
                reason: FinishReason = end.value
                return reason
            self.timings = clock.read()
            self.token_ids.append(token_id)
            piece = scanner.push(decoder.push(token_id))
            if piece:
                yield piece
            if scanner.stopped:
                return "stop"


class _Clock:
    """Seconds to the first reading, and from there to the latest."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first: float | None = None

    def read(self) -> Timings:
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        return Timings(self._first - self._started, now - self._first)


class StopScanner:
    """Lets text through up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take a piece of text, and return what is now known to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        cuts = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """The rest, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Session:
    """A loaded model with its tokenizer; made by `open_session`."""

    def __init__(
        self,
        name: str,
        directory: Path,
        tokenizer: Tokenizer,
        engine: Engine,
        plan: MemoryPlan,
        load_s: float,
        *,
        exact: bool = False,
    ) -> None:
        self.name = name
        self.directory = directory
        self.exact = exact
        self.tokenizer = tokenizer
        self.engine = engine
        self.plan = plan
        self.load_s = load_s

    @property
    def config(self) -> ModelConfig:
        return self.engine.model.config

    @property
    def computing(self) -> str:
        """What keys and values depend on beside model and ids: the type, and whether activations are rounded."""
        return f"{self.engine.model.dtype}{' exact' if self.exact else ''}"

    @property
    def max_seq_len(self) -> int:
        return self.engine.max_seq_len

    @property
    def cache_bytes(self) -> int:
        """What the cache takes now."""
        return self.engine.cache.size_bytes

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a completion: the tokenizer's own end and those that the checkpoint's configuration states."""
        return self.tokenizer.eos_ids | frozenset(self.config.eos_ids)

    def describe(self) -> str:
        """One line: model, scheme, device, context and memory; types where they are not the device's usual ones."""
        device, dtype, cache_dtype = self.engine.device, self.engine.model.dtype, self.engine.cache.dtype
        scheme = stored_scheme(self.directory) or self.config.dtype
        computing = "" if dtype == choose_dtype(None, device) else f" in {_name(dtype)}"
        usual = choose_cache_dtype(None, dtype, device.type, self.exact)
        stored = "" if cache_dtype == usual else f" of {_name(cache_dtype)}"
        weights, cache = size_text(self.plan.weights_bytes), size_text(self.plan.cache_bytes)
        return (
            f"{self.name} ({scheme}) on {device.type}{computing}, context {self.engine.max_seq_len}, "
            f"weights {weights} (cache up to {cache}{stored})"
        )

    def complete(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        continues_text: bool = False,
        through: Sequence[Callable[[ChooseToken], ChooseToken]] = (),
    ) -> Completion:
        """Continue the ids, as far as the model goes on or `max_tokens` or the context allow.

        `continues_text` says that the completion goes on in the midst of a text, so that a space which it begins
        with is part of it; an answer's first space is not. `through`: what is put around the sampler, the innermost
        first: a grammar, a recorder of log-probabilities.

        Raises:
            ContextOverflowError: the ids leave no room for one token.
        """
        self.engine.require_room(len(token_ids))
        sampler = Sampler(params)
        choose: ChooseToken = sampler
        for wrap in through:
            choose = wrap(choose)
        ids = self.engine.generate(token_ids, choose, stop_ids=self.stop_ids, max_tokens=max_tokens)
        n_cached = self.engine.n_reusable(token_ids)
        decoder = self.tokenizer.stream(continues_text=continues_text)
        return Completion(token_ids, ids, decoder, StopScanner(stop), n_cached=n_cached, seed=sampler.seed)

    def complete_chat(
        self,
        conversation: Conversation,
        params: SamplingParams,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Completion:
        """The assistant's next message, or the rest of an open one (`prefix`).

        Raises what `complete` and the tokenizer's `encode_chat` raise.
        """
        token_ids = self.tokenizer.encode_chat(conversation)
        goes_on = bool(conversation.messages) and conversation.messages[-1].prefix
        return self.complete(token_ids, params, max_tokens=max_tokens, stop=stop, continues_text=goes_on)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def open_session(
    directory: Path,
    options: SessionOptions,
    *,
    name: str | None = None,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] = lambda message: None,
) -> Session:
    """Load the model in `directory`. `on_note` is told when the context is shorter than the model's own, and
    when kernels are being compiled.

    Raises:
        UsageError: no such device, type, number of threads or context length, or options that exclude each other.
        NotEnoughMemoryError: weights, cache and workspace do not fit, or memory ran out all the same.
        IntegrityError, MistralError: the checkpoint is damaged, or of a kind that is not supported.
    """
    started = time.perf_counter()
    config = read_config(directory)
    set_threads(options.threads)
    device = choose_device(options.device)
    room = room_bytes(device, options.memory_limit)
    with out_of_memory_as(
        f"memory ran out while loading {directory}",
        "close other programs, or make a smaller build with `mistral quantize --bits 4`",
    ):
        demand = demand_under(options, directory, device, room)
        if options.exact:
            _require_exact(device, demand.dtype)
        tokenizer = load_fitting_tokenizer(directory, config.vocab_size)
        plan = _plan(config, options, demand, device, room, on_note)
        model = load_model(
            directory, device=device, dtype=demand.dtype, exact=options.exact, on_progress=on_progress
        )
    with _told_if_slow(on_note, *_COMPILING.get(device.type, _COMPILING["cpu"])):
        load_kernels(model)
        engine = Engine(
            model,
            max_seq_len=plan.ctx,
            chunk=demand.chunk,
            slack=demand.slack,
            n_seqs=options.n_seqs,
            device=device,
            cache_dtype=demand.cache_dtype,
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was used to load and to join
        _check_limit(device, options.memory_limit)
    load_s = time.perf_counter() - started
    return Session(name or directory.name, directory, tokenizer, engine, plan, load_s, exact=options.exact)


def demand_under(options: SessionOptions, directory: Path, device: torch.device, room_bytes: int) -> Demand:
    """What a run of the model in `directory` asks for; the options' gaps are filled by what the device has room for.

    Raises:
        UsageError: no such type.
        IntegrityError, MistralError: the files' headers are damaged, or of a kind that is not supported.
    """
    dtype = choose_dtype(options.dtype, device)
    return demand_of(
        loaded_sizes(directory, dtype, device.type),
        dtype,
        options.chunk or default_chunk(device, room_bytes),
        options.slack or default_slack(device, room_bytes),
        device.type,
        choose_cache_dtype(options.kv, dtype, device.type, options.exact),
        options.n_seqs,
    )


@contextlib.contextmanager
def _told_if_slow(on_note: Callable[[str], None], message: str, after_s: float) -> Iterator[None]:
    """Say it when what is done here takes longer than that."""
    timer = threading.Timer(after_s, on_note, [message])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _plan(
    config: ModelConfig,
    options: SessionOptions,
    demand: Demand,
    device: torch.device,
    free_bytes: int,
    on_note: Callable[[str], None],
) -> MemoryPlan:
    limit = options.memory_limit
    if limit is not None and device.type == "cuda":
        cap_memory(device, free_bytes)
    elif limit is not None:
        on_note(f"on the {device.type} a memory limit bounds the plan; nothing enforces it")
    free_is = "free" if limit is None else f"within the limit of {size_text(limit)}"
    if options.ctx is not None:
        return requested_plan(config, demand, options.ctx, free_bytes, free_is)
    plan = fitting_plan(config, demand, free_bytes, free_is)
    if plan.ctx < default_ctx(config):
        on_note(f"context shortened to {plan.ctx} tokens, which is what fits in memory: {plan.describe()}")
    return plan


def _require_exact(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError where activations would be rounded all the same: a note would be overlooked in a pipe."""
    if device.type == "cuda":
        raise UsageError(
            f"--exact is for the CPU: on {device.type} activations have 16 bits, or 8 in matmuls with int4",
            "add --device cpu, or leave --exact out",
        )
    if dtype != torch.float32:
        raise UsageError(
            f"--exact computes in float32, not in {_name(dtype)}", "leave one of --exact and --dtype out"
        )


def _check_limit(device: torch.device, limit_bytes: int | None) -> None:
    """Raise NotEnoughMemoryError if the driver counts more than the limit, which the plan should have kept."""
    if limit_bytes is not None and (taken := taken_bytes(device)) > limit_bytes:
        raise NotEnoughMemoryError(
            f"the process takes {size_text(taken)} on {device}, and --memory-limit is {size_text(limit_bytes)}",
            "raise the limit, or ask for a shorter --ctx",
        )
