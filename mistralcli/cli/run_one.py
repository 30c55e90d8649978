"""One prompt of `mistral run`: its ids, what its answer must keep to, and how that is printed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mistralcli.cli import console
from mistralcli.cli.answers import note_end
from mistralcli.cli.run_output import Form, print_answer
from mistralcli.cli.run_prompt import Grammar
from mistralcli.conversation import NO_EXTRAS, ChatExtras, Conversation
from mistralcli.errors import QualityError, UsageError
from mistralcli.run_options import SamplingParams, room_for_answer

if TYPE_CHECKING:
    from mistralcli.logprobs import Recorder
    from mistralcli.session import Session

Overflow = Literal["error", "head", "tail"]


@dataclass(frozen=True)
class Prompt:
    """A prompt before it is tokenized. `suffix`: what follows the gap that is to be filled; None is no gap."""

    text: str
    system: str | None = None
    raw: bool = False
    suffix: str | None = None
    extras: ChatExtras = NO_EXTRAS

    def __post_init__(self) -> None:
        if self.raw and self.suffix is not None:
            raise UsageError("--raw and --fim exclude each other", "leave one of them out")
        if not self.is_chat:
            flag = "--raw" if self.raw else "--fim"
            given = {
                "--system": self.system,
                "--tools": self.extras.tools,
                "--template-vars": self.extras.variables,
            }
            for name, value in given.items():
                if value:
                    raise UsageError(
                        f"{flag} uses no template, so {name} has nowhere to go", "leave one of them out"
                    )

    @property
    def is_chat(self) -> bool:
        return not self.raw and self.suffix is None

    def ids(self, session: "Session", text: str | None = None) -> list[int]:
        """The ids of this prompt, or of one with another text."""
        text = self.text if text is None else text
        tokenizer = session.tokenizer
        if self.suffix is not None:
            return tokenizer.encode_fim(text, self.suffix)
        if self.raw:
            return _some(tokenizer.encode(text, bos=True))
        conversation = Conversation().with_system(self.system).add("user", text)
        return tokenizer.encode_chat(conversation, self.extras)


def _some(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise UsageError("the prompt has no tokens", "give the model something to continue")
    return token_ids


def fitting_ids(
    session: "Session", prompt: Prompt, overflow: Overflow, max_tokens: int | None
) -> tuple[list[int], int]:
    """The prompt's ids, and how many tokens of its text were left out so that it fits.

    overflow: `error` leaves nothing out, so that what is too long is refused later; `head` keeps the beginning of the
    text, `tail` its end. The system prompt and the template are never cut.

    Raises:
        UsageError: even without the text it does not fit.
    """
    token_ids = prompt.ids(session)
    if overflow == "error":
        return token_ids, 0
    answer = room_for_answer(session.max_seq_len) if max_tokens is None else max_tokens
    room = session.max_seq_len - max(1, answer)
    text_ids = session.tokenizer.encode(prompt.text)
    n_kept = len(text_ids)
    while len(token_ids) > room and n_kept > 0:
        n_kept = max(0, n_kept - (len(token_ids) - room))
        kept = text_ids[:n_kept] if overflow == "head" else text_ids[len(text_ids) - n_kept :]
        token_ids = prompt.ids(session, session.tokenizer.decode(kept))
    if n_kept == 0 and text_ids:
        raise UsageError(
            f"a context of {session.max_seq_len} tokens has no room for the prompt's text beside an answer",
            "ask for a longer --ctx, or for a lower --max-tokens",
        )
    return token_ids, len(text_ids) - n_kept


def use_prefix(session: "Session", prompt: Prompt, token_ids: list[int], path: Path) -> None:
    """Have the cache hold what every prompt with this system prompt begins with: from `path`, or to `path`.

    Raises:
        UsageError: there is no such part, or the file is of another model, of another text or of another kind of cache.
    """
    from mistralcli.saved_cache import digest_of, load_cache, save_cache

    digest = digest_of(session)
    if path.exists():
        return load_cache(path, session.engine, digest, token_ids)
    if prompt.system is None:
        raise UsageError("--prefix-cache keeps the system prompt, and there is none", "give --system-file")
    others = [prompt.ids(session, text) for text in ("a", "1")]  # no text begins with both
    n_shared = next(
        (i for i, ids in enumerate(zip(token_ids, *others, strict=False)) if len(set(ids)) > 1), 0
    )
    if n_shared < 2:
        raise UsageError("this model's chat format puts nothing before the text", "leave --prefix-cache out")
    session.engine.fill(token_ids[:n_shared])
    return save_cache(path, session.engine, digest)


@dataclass(frozen=True)
class Request:
    """All that `run` was asked for one prompt. `n_logprobs` None records none."""

    prompt: Prompt
    params: "SamplingParams"
    overflow: Overflow
    max_tokens: int | None
    stop: tuple[str, ...]
    grammar: Grammar | None
    n_logprobs: int | None
    form: Form
    prefix_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.grammar is not None and self.prompt.extras.tools:
            raise UsageError("a grammar and --tools exclude each other", "leave one of them out")


def answer_one(session: "Session", request: Request, *, quiet: bool) -> None:
    """Answer on stdout.

    Raises:
        ContextOverflowError: the prompt leaves no room for one token, and is not to be cut.
        QualityError: the answer ended before it was whole by its grammar, or a tool's call cannot be read.
    """
    prompt = request.prompt
    token_ids, n_cut = fitting_ids(session, prompt, request.overflow, request.max_tokens)
    if n_cut and not quiet:
        console.warn(
            f"the prompt was too long: {n_cut} tokens of its text were left out (--overflow {request.overflow})"
        )
    if request.prefix_cache is not None:
        use_prefix(session, prompt, token_ids, request.prefix_cache)
    constraint = None if request.grammar is None else request.grammar.compile(session)
    recorder = None if request.n_logprobs is None else _recorder(request.n_logprobs)
    completion = session.complete(
        token_ids,
        request.params,
        max_tokens=request.max_tokens,
        stop=request.stop,
        continues_text=not prompt.is_chat or constraint is not None,  # whose every character counts
        through=[one.around for one in (constraint, recorder) if one is not None],
    )
    recorded = None if recorder is None else recorder.tokens
    print_answer(session, completion, request.form, logprobs=recorded, with_tools=bool(prompt.extras.tools))
    if not quiet:
        note_end(completion)
    if constraint is not None and not constraint.is_complete:
        raise QualityError(
            f"the answer ended ({completion.finish_reason}) before it was whole by its grammar",
            "allow more with --max-tokens or --ctx",
        )


def _recorder(n_top: int) -> "Recorder":
    from mistralcli.logprobs import Recorder

    return Recorder(n_top)
