"""`mistral run --batch`: a prompt a line in, an answer a line out, several decoded together.

What is finished is kept as it comes in OUT.partial, in whatever order, each line with the digest of the input line that
it answers; so a run that was killed goes on, and computes nothing again. When all is done OUT gets the lines in the
order of the input.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistralcli.cli import console
from mistralcli.cli.answers import load_session, read_text
from mistralcli.cli.run_prompt import Grammar
from mistralcli.conversation import Conversation, parse_messages
from mistralcli.errors import MistralError, QualityError, UsageError
from mistralcli.file_lock import try_lock

if TYPE_CHECKING:
    from mistralcli.batch import Answer, Job
    from mistralcli.grammar import Constraint
    from mistralcli.run_options import SamplingParams, SessionOptions
    from mistralcli.session import Session

_KEYS = {"id", "prompt", "messages", "system", "max_tokens", "seed", "temperature", "stop"}


@dataclass(frozen=True)
class Settings:
    """What holds for every line that does not say otherwise; the seed of the line n is `params.seed` + n."""

    params: "SamplingParams"
    system: str | None
    max_tokens: int | None
    stop: tuple[str, ...]
    grammar: Grammar | None
    identity: str
    """All that an answer depends on beside its line, as text."""


@dataclass(frozen=True)
class Line:
    """A line of the input; `digest` is of it and of the settings."""

    index: int
    text: str
    digest: str


def batch_settings(
    model: str | None,
    options: "SessionOptions",
    params: "SamplingParams",
    system: str | None,
    max_tokens: int | None,
    stop: Sequence[str],
    grammar: Grammar | None,
) -> Settings:
    """What the flags say. Without --seed it is 0, so that a run that goes on gives what it would have given."""
    params = params if params.seed is not None else replace(params, seed=0)
    said = (
        model,
        options.ctx,
        options.device,
        options.dtype,
        options.exact,
        options.kv,
        params,
        system,
        max_tokens,
        tuple(stop),
        grammar,
    )
    return Settings(params, system, max_tokens, tuple(stop), grammar, repr(said))


def run_batch(
    model: str | None,
    options: "SessionOptions",
    settings: Settings,
    source: Path,
    output: Path,
    n_seqs: int,
    quiet: bool,
) -> None:
    """Answer every line of `source` into `output`; lines that fail have an error there, and are counted at the end.

    Raises:
        UsageError: the input cannot be read.
        MistralError: some lines have an error instead of an answer.
    """
    lines = read_lines(source, settings)
    session = load_session(model, replace(options, n_seqs=max(1, min(n_seqs, len(lines)))), quiet)
    n_failed = answer_lines(session, lines, output, settings, quiet=quiet)
    if n_failed:
        raise MistralError(
            f"{n_failed} of {len(lines)} lines have an error instead of an answer", f"see {output}"
        )


def read_lines(path: Path, settings: Settings) -> list[Line]:
    """The lines of the input that are not empty. Raises UsageError where it cannot be read."""
    text = console.read_in() if str(path) == "-" else read_text(path)
    lines = [line for line in text.split("\n") if line.strip()]
    return [
        Line(i, line, hashlib.sha256(f"{settings.identity}\n{i}\n{line}".encode()).hexdigest()[:32])
        for i, line in enumerate(lines)
    ]


def answer_lines(
    session: "Session", lines: Sequence[Line], output: Path, settings: Settings, *, quiet: bool
) -> int:
    """Answer all lines that have no answer yet, and write `output`; returns how many ended in an error.

    Raises:
        DiskError: the output cannot be written. What was finished stays.
        UsageError: another process is writing it.
    """
    from mistralcli.batch import complete_all

    partial = output.with_name(output.name + ".partial")
    with (
        partial.open("a", encoding="utf-8", errors="backslashreplace") as file,
        console.steps("answering", quiet=quiet) as update,
    ):
        if not try_lock(file.fileno()):
            raise UsageError(
                f"another run is writing {partial}", "wait for it, or name another output with -o"
            )
        done = _finished(partial, {line.digest for line in lines})
        if done and not quiet:
            console.note(f"going on: {len(done)} of {len(lines)} lines are answered in {partial}")
        left = [line for line in lines if line.digest not in done]

        def keep(line: Line, answer: dict[str, Any]) -> None:
            file.write(json.dumps({"digest": line.digest} | answer, ensure_ascii=False) + "\n")
            file.flush()
            done[line.digest] = answer
            update(len(done), len(lines))

        update(len(done), len(lines))
        by_index = {line.index: line for line in left}
        asked = _Asked(session, settings)
        jobs = asked.jobs(left, lambda line, error: keep(line, _failed(line, error)))
        for answer in complete_all(session, jobs):
            line = by_index[answer.index]
            error = asked.error(answer)
            keep(line, _as_dict(line, answer) if error is None else _failed(line, error))
        return _publish(lines, done, partial, output)


def _publish(lines: Sequence[Line], done: dict[str, dict[str, Any]], partial: Path, output: Path) -> int:
    """Write the output in order, and drop the partial one."""
    ordered = [done[line.digest] for line in lines]
    whole = output.with_name(output.name + ".whole")
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in ordered)
    whole.write_text(text, encoding="utf-8", errors="backslashreplace")  # as JSON writes half of a pair
    whole.replace(output)
    partial.unlink(missing_ok=True)
    return sum("error" in one for one in ordered)


def _finished(partial: Path, digests: set[str]) -> dict[str, dict[str, Any]]:
    """The answers that an earlier run kept, not its errors. A line that it was killed in the midst of is cut off."""
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    found = {}
    for line in whole.decode("utf-8", errors="replace").split("\n"):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            answer = json.loads(line)
            found[answer.pop("digest")] = answer
    return {digest: answer for digest, answer in found.items() if digest in digests and "error" not in answer}


class _Asked:
    """Lines as jobs, and what the grammar, if there is one, says of their answers."""

    def __init__(self, session: "Session", settings: Settings) -> None:
        self._session = session
        self._settings = settings
        self._grammar = None if settings.grammar is None else settings.grammar.compile(session)
        self._constraints: dict[int, Constraint] = {}

    def jobs(self, lines: Sequence[Line], fail: Callable[[Line, MistralError], None]) -> "Iterator[Job]":
        """One that cannot be read fails, and the next is taken."""
        for line in lines:
            try:
                yield self._job(line)
            except MistralError as error:
                fail(line, error)

    def error(self, answer: "Answer") -> MistralError | None:
        """What is wrong with an answer."""
        constraint = self._constraints.pop(answer.index, None)
        if answer.error is None and constraint is not None and not constraint.is_complete:
            return QualityError(
                f"the answer ended ({answer.finish_reason}) before it was whole by its grammar"
            )
        return answer.error

    def _job(self, line: Line) -> "Job":
        from mistralcli.batch import Job

        settings, asked = self._settings, _read(line.text)
        seed = asked.get("seed", ((settings.params.seed or 0) + line.index) % 2**63)
        temperature = asked.get("temperature", settings.params.temperature)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UsageError(f"seed is {seed!r}; it must be a whole number")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise UsageError(f"temperature is {temperature!r}; it must be a number")
        params = replace(settings.params, seed=seed, temperature=temperature)
        max_tokens = _max_tokens(asked.get("max_tokens", settings.max_tokens))
        stop = (*settings.stop, *_texts(asked.get("stop", ())))
        token_ids = self._session.tokenizer.encode_chat(_conversation(asked, settings.system))
        if self._grammar is None:
            return Job(line.index, token_ids, params, max_tokens, stop)
        constraint = self._constraints[line.index] = self._grammar.copy()
        return Job(line.index, token_ids, params, max_tokens, stop, (constraint.around,))


def _read(text: str) -> dict[str, Any]:
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line is no JSON: {error}") from None
    if not isinstance(asked, dict):
        raise UsageError("the line is no JSON object", 'like {"prompt": "Why is the sky blue?"}')
    if unknown := sorted(asked.keys() - _KEYS):
        raise UsageError(
            f"the line has the unknown key {unknown[0]!r}", f"known are {', '.join(sorted(_KEYS))}"
        )
    return asked


def _conversation(asked: dict[str, Any], system: str | None) -> Conversation:
    if ("prompt" in asked) == ("messages" in asked):
        raise UsageError("the line needs a prompt or messages", "and not both")
    messages = asked.get("messages", [{"role": "user", "content": asked.get("prompt")}])
    own_system = asked.get("system", system)
    if own_system is not None and not isinstance(own_system, str):
        raise UsageError("system must be a text")
    conversation = parse_messages(messages)
    return conversation.with_system(own_system) if own_system is not None else conversation


def _max_tokens(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UsageError(f"max_tokens is {value!r}; it must be 0 or more")
    return value


def _texts(value: Any) -> Sequence[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError("stop must be a text, or a list of texts")
    return texts


def _named(line: Line) -> dict[str, Any]:
    """How an answer says which line it belongs to: by number, and by its id where it has one."""
    name: dict[str, Any] = {"index": line.index}
    with suppress(ValueError, RecursionError, AttributeError):
        own = json.loads(line.text).get("id")
        name |= {} if own is None else {"id": own}
    return name


def _as_dict(line: Line, answer: "Answer") -> dict[str, Any]:
    return _named(line) | {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.n_prompt, "completion_tokens": len(answer.token_ids)},
        "seed": answer.seed,
    }


def _failed(line: Line, error: MistralError) -> dict[str, Any]:
    return _named(line) | {"error": error.message, "hint": error.hint}


def require_output(output: Path) -> None:
    """Raise UsageError where the answers would take the place of something."""
    if output.exists():
        raise UsageError(f"{output} exists already", "name another file, or remove it")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is no directory", "make it first")
