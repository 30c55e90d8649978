"""`mistral template`: what a model really receives for a prompt or a conversation."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import read_prompt, read_text
from mistralcli.cli.options import Model, Raw, System, SystemFile, TemplateVars, Tools, utf8_text
from mistralcli.cli.run_prompt import read_extras, read_system
from mistralcli.cli.tables import table
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from mistralcli.cli.token_text import Token
    from mistralcli.conversation import ChatExtras, Conversation
    from mistralcli.prompt_parts import Part
    from mistralcli.tokenizer import Tokenizer

_STYLES: "dict[Part, str]" = {
    "system": "35",
    "user": "36",
    "assistant": "32",
    "tools": "31",
    "template": "2",
}
"""Colours that palettes make readable on light and on dark; yellow is not."""

_CONTROL_STYLE = "7"
"""Reversed: what only looks like a control token is not."""

_EXAMPLE = 'a conversation is like [{"role": "user", "content": "Hi"}]'


def template(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; `-` or none reads standard input.", callback=utf8_text),
    ] = None,
    model: Model = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            "--messages",
            metavar="FILE.json",
            help='A conversation: a list of {"role": …, "content": …}, or an object with it as "messages".',
        ),
    ] = None,
    system: System = None,
    system_file: SystemFile = None,
    raw: Raw = False,
    tools: Tools = None,
    template_vars: TemplateVars = None,
    ids: Annotated[
        bool, typer.Option("--ids", help="Print a table of the ids, whose they are, and their pieces.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
) -> None:
    """Show what a model receives for a prompt: messages, control tokens, and what its chat format adds.

    No weights are loaded. On a terminal messages are coloured by role, the format's own text is faint, and control
    tokens are reversed; --ids and --json say it in words. An assistant's message at the end is one to be continued.
    """
    if ids and as_json:
        raise UsageError("--ids and --json exclude each other", "give one of them")
    if messages is not None and (prompt is not None or raw):
        given = "--raw" if prompt is None else "a prompt"
        raise UsageError(f"--messages and {given} exclude each other", "leave one of them out")
    from mistralcli.cli.token_text import load_named_tokenizer, model_name

    own_system, extras = read_system(system, system_file), read_extras(tools, template_vars or ())
    if raw:
        _refuse_with_raw(own_system, extras)
    conversation = (
        _asking(read_prompt(prompt, None), own_system)
        if messages is None
        else read_messages(messages, own_system)
    )
    tokens = _received(load_named_tokenizer(model), conversation, extras, raw=raw)
    if as_json:
        entries = [token.as_dict() | {"role": part} for token, part in tokens]
        facts = {"model": model_name(model), "n_tokens": len(entries), "tokens": entries}
        console.write_out(json.dumps(facts, ensure_ascii=False) + "\n")
    else:
        console.write_styled(_rows(tokens) if ids else _text(tokens), sys.stdout)
        _say_legend(tokens)


def _refuse_with_raw(system: str | None, extras: "ChatExtras") -> None:
    given = {"--system": system, "--tools": extras.tools, "--template-vars": extras.variables}
    for name, value in given.items():
        if value:
            raise UsageError(f"--raw uses no template, so {name} has nowhere to go", "leave one of them out")


def _asking(prompt: str, system: str | None) -> "Conversation":
    from mistralcli.conversation import Conversation

    return Conversation().with_system(system).add("user", prompt)


def read_messages(path: Path, system: str | None) -> "Conversation":
    """The conversation in a JSON file, its system prompt replaced by `system` where there is one.

    Raises:
        UsageError: there is none.
    """
    from dataclasses import replace

    from mistralcli.conversation import Conversation, parse_messages

    is_piped = str(path) == "-"
    source, text = ("standard input", console.read_in()) if is_piped else (path, read_text(path))
    try:
        found = json.loads(text)
        conversation = parse_messages(found.get("messages") if isinstance(found, dict) else found)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is no JSON: {error}", _EXAMPLE) from None
    except UsageError as error:
        raise UsageError(f"{source} is no conversation: {error.message}", _EXAMPLE) from None
    if system is not None:
        conversation = conversation.with_system(system)
    *before, last = conversation.messages or (None,)
    if last is None or last.role != "assistant":
        return conversation
    return Conversation.of(message for message in (*before, replace(last, prefix=True)) if message)


def _received(
    tokenizer: "Tokenizer", conversation: "Conversation", extras: "ChatExtras", *, raw: bool
) -> "list[tuple[Token, Part]]":
    """The tokens that the model gets, each with whose it is."""
    from mistralcli.cli.token_text import tokens_of
    from mistralcli.prompt_parts import prompt_parts

    if raw:
        token_ids = tokenizer.encode(conversation.messages[-1].content, bos=True)
        tokens = tokens_of(tokenizer, token_ids)
        return [(token, "template" if token.control else "user") for token in tokens]
    token_ids = tokenizer.encode_chat(conversation, extras)
    parts = prompt_parts(tokenizer, conversation, extras)
    return list(zip(tokens_of(tokenizer, token_ids), parts, strict=True))


def _style(token: "Token", part: "Part") -> str:
    return _CONTROL_STYLE if token.control else _STYLES[part]


def _text(tokens: "Sequence[tuple[Token, Part]]") -> Iterator[tuple[str, str]]:
    """What the tokens say, in runs of one style; bytes that are no characters, as at a foreign border, as U+FFFD."""
    for style, run in groupby(tokens, key=lambda one: _style(*one)):
        together = b"".join((token.control or "").encode() + token.data for token, _ in run)
        yield together.decode("utf-8", "replace"), style
    if console.is_terminal(sys.stdout):
        yield "\n", ""


def _rows(tokens: "Sequence[tuple[Token, Part]]") -> Iterator[tuple[str, str]]:
    cells = [(str(token.token_id), part, token.shown) for token, part in tokens]
    header, *lines = table([("ID", "ROLE", "PIECE"), *cells]).splitlines(keepends=True)
    yield header, ""
    yield from ((line, _style(*one)) for line, one in zip(lines, tokens, strict=True))


def _say_legend(tokens: "Sequence[tuple[Token, Part]]") -> None:
    """On stderr how many tokens there are, and on a terminal with colours what these mean."""
    console.note(f"{len(tokens)} tokens")
    if console.has_color(sys.stdout) and console.has_color(sys.stderr):
        present = {part for _, part in tokens}
        words = [(f"{part} ", style) for part, style in _STYLES.items() if part in present]
        console.write_styled([*words, ("control token", _CONTROL_STYLE), ("\n", "")], sys.stderr)
