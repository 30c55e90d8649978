"""What `run` and `chat` share: where a prompt comes from, loading a model, and a line of statistics."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistralcli.cli import console
from mistralcli.demo import DEMO
from mistralcli.errors import MistralError, UsageError

if TYPE_CHECKING:
    from mistralcli.run_options import SessionOptions
    from mistralcli.session import Completion, Session

_PULL = "mistral pull mistralai/Mistral-7B-Instruct-v0.3"


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's parts in order: argument, file, and standard input when it is no terminal.

    One line end at the end of the file and of standard input is not part of the prompt.

    Raises:
        UsageError: there is nothing to answer, or a source cannot be read as UTF-8 text.
    """
    parts = [prompt] if prompt not in (None, "-") else []
    if file is not None and str(file) != "-":
        parts.append(_without_line_end(read_text(file)))
    if prompt == "-" or str(file) == "-" or not console.is_terminal(sys.stdin):
        parts.append(_without_line_end(console.read_in()))
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise UsageError(
            "there is no prompt", 'pipe one in, or give one to run: mistral run "Why is the sky blue?"'
        )
    return text


def read_text(path: Path) -> str:
    """A file's text. Raises UsageError where it cannot be read as UTF-8."""
    try:
        return console.decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "check its name, and who may read it"
        ) from None


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


@dataclass(frozen=True)
class ModelChoice:
    """A model that is here and can be run: as the user named it, and where it is."""

    name: str
    directory: Path


def choose_model(model: str | None, quiet: bool) -> ModelChoice:
    """What the model's name means; without a name it is the built-in demo, and that is said.

    Raises:
        ModelNotFoundError: there is none of that name.
        QualityError, IntegrityError: there is, but it is not to be run.
    """
    from mistralcli import store

    if model is not None:
        return ModelChoice(model, store.resolve_to_run(model))
    if not quiet:
        console.note(f"no model was named, so the built-in demo answers; for a real one: {_PULL}")
    return ModelChoice(DEMO, store.resolve_demo())


def load_session(model: str | None, options: "SessionOptions", quiet: bool) -> "Session":
    """Choose the model and load it, with a progress bar on a terminal. Raises what `choose_model` raises."""
    from mistralcli import store
    from mistralcli.session import open_session

    choice = choose_model(model, quiet)
    store.note_use(choice.directory)
    with console.progress(f"loading {choice.name}", quiet=quiet) as update:
        return open_session(
            choice.directory,
            options,
            name=choice.name,
            on_progress=update,
            on_note=_silent if quiet else console.note,
        )


def _silent(message: str) -> None:
    """What --quiet says."""


def warn_if_missing(model: str) -> None:
    """Say what a run of a model that is named now, and may be pulled later, would be refused with."""
    from mistralcli import store

    try:
        store.resolve(model)
    except MistralError as error:
        console.warn(error.message + (f"; {error.hint}" if error.hint else ""))


def note_end(completion: "Completion") -> None:
    """Say on stderr how an answer went, and that there is none where the model ended it at once."""
    if not completion.text and completion.finish_reason == "stop":
        console.note("the model's answer is empty")
    console.note(statistics(completion))


def statistics(completion: "Completion") -> str:
    """One line: tokens and speed of the prompt and of the answer, and why it ended."""
    prefill_s, decode_s = completion.timings.prefill_s, completion.timings.decode_s
    n_new, n_decoded = completion.n_prompt - completion.n_cached, len(completion.token_ids) - 1
    parts = [
        f"prompt {completion.n_prompt} tokens in {prefill_s:.2f} s ({n_new / max(prefill_s, 1e-9):.0f}/s)"
    ]
    parts.append(f"answer {len(completion.token_ids)} tokens in {decode_s:.2f} s")
    if n_decoded > 0 and decode_s > 0:
        parts[-1] += f" ({n_decoded / decode_s:.1f}/s)"
    if completion.finish_reason == "length":
        parts.append("cut off at the length limit")
    return "; ".join(parts)
