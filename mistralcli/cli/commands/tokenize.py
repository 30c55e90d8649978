"""`mistral tokenize`: what a text is to a model."""

import json
import sys
from typing import Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.options import Model, utf8_text
from mistralcli.cli.tables import table
from mistralcli.errors import UsageError


def tokenize(
    text: Annotated[
        str | None, typer.Argument(help="The text; `-` or none reads standard input.", callback=utf8_text)
    ] = None,
    model: Model = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids alone, in one line.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print how many tokens there are.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Show the tokens of a text: ids and pieces. No weights are loaded.

    Every character counts, a line end at the end too, and what looks like a control token is text. What a chat format
    adds to a prompt is `mistral template`'s.
    """
    if ids + count + as_json > 1:
        raise UsageError("--ids, --count and --json exclude each other", "give one of them")
    if text in (None, "-"):
        if text is None and console.is_terminal(sys.stdin):
            raise UsageError("there is no text", 'pipe one in, or give one: mistral tokenize "Hello"')
        text = console.read_in()
    assert text is not None
    from mistralcli.cli.token_text import load_named_tokenizer, model_name, tokens_of

    tokenizer = load_named_tokenizer(model)
    token_ids = tokenizer.encode(text)
    if ids:
        console.write_out(" ".join(map(str, token_ids)) + "\n")
    elif count:
        console.write_out(f"{len(token_ids)}\n")
    elif as_json:
        tokens = [token.as_dict() for token in tokens_of(tokenizer, token_ids)]
        facts = {"model": model_name(model), "n_tokens": len(tokens), "tokens": tokens}
        console.write_out(json.dumps(facts, ensure_ascii=False) + "\n")
    else:
        rows = [(str(token.token_id), token.shown) for token in tokens_of(tokenizer, token_ids)]
        console.write_out(table([("ID", "PIECE"), *rows]))
        console.note(f"{len(rows)} tokens")
