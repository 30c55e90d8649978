"""How `run` prints an answer: as text, as one JSON object, or as a line of JSON for each piece that comes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from mistralcli.cli import console

if TYPE_CHECKING:
    from mistralcli.logprobs import TokenLogprob
    from mistralcli.session import Completion, Session
    from mistralcli.tools import ToolCall

Form = Literal["text", "json", "ndjson"]


def print_answer(
    session: "Session",
    completion: "Completion",
    form: Form,
    *,
    logprobs: "Sequence[TokenLogprob] | None" = None,
    with_tools: bool = False,
) -> None:
    """Generate, and print as it comes what can be printed before the end.

    `logprobs` grows with the completion. With tools an answer is printed when it is whole, since what begins as text
    may become a call: the calls as a JSON list where there are any, else the text.

    Raises:
        QualityError: a call cannot be read.
    """
    n_printed = 0
    for piece in completion:
        if form == "text" and not with_tools:
            console.write_out(piece)
        elif form == "ndjson":
            shown: dict[str, Any] = {"text": piece, "token_ids": completion.token_ids[n_printed:]}
            if logprobs is not None:
                shown["logprobs"] = [
                    _as_json(session, one) for one in logprobs[n_printed : len(completion.token_ids)]
                ]
            n_printed = len(completion.token_ids)
            _print_json(shown)
    text, calls = _answer_and_calls(session, completion) if with_tools else (completion.text, [])
    if form == "text" and with_tools:
        console.write_out(json.dumps([asdict(call) for call in calls], ensure_ascii=False) if calls else text)
    if form != "text":
        whole = as_dict(session, completion) | {"text": text}
        if with_tools:
            whole["tool_calls"] = [asdict(call) for call in calls]
        if logprobs is not None:
            whole["logprobs"] = [_as_json(session, one) for one in logprobs[: len(completion.token_ids)]]
        _print_json(whole)
    elif console.is_terminal(sys.stdout):
        console.write_out("\n")


def _print_json(value: dict[str, Any]) -> None:
    console.write_out(json.dumps(value, ensure_ascii=False) + "\n")


def _answer_and_calls(session: "Session", completion: "Completion") -> "tuple[str, list[ToolCall]]":
    from mistralcli.tools import parse_calls

    return parse_calls(completion.token_ids, session.tokenizer)


def _as_json(session: "Session", token: "TokenLogprob") -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "token": session.tokenizer.render([token.token_id]),
        "logprob": token.logprob,
        "top": [
            {"token_id": token_id, "token": session.tokenizer.render([token_id]), "logprob": logprob}
            for token_id, logprob in token.top
        ],
    }


def as_dict(session: "Session", completion: "Completion") -> dict[str, Any]:
    """The object that --json prints, and the last line of --ndjson."""
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {"prompt_tokens": completion.n_prompt, "completion_tokens": len(completion.token_ids)},
        "timings": {
            "load_s": round(session.load_s, 4),
            "prefill_s": round(completion.timings.prefill_s, 4),
            "decode_s": round(completion.timings.decode_s, 4),
        },
        "seed": completion.seed,
        "model": session.name,
    }
