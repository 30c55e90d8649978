"""Functions that a model may call: their descriptions on the way in, its calls on the way out.

A call comes as Mistral's control tokens frame it (`[TOOL_CALLS]`, and from v11 on `[ARGS]` and `[CALL_ID]`), or
between `<tool_call>` and `</tool_call>`, as many fine-tunes write it. Text that only looks like a control token
frames no call: names of control tokens come from ids.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mistralcli.errors import QualityError, UsageError
from mistralcli.tokenizer import Tokenizer

_FRAMES = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_TOOL = 'a tool is {"name": …, "description": …, "parameters": a JSON schema}'
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call of the function `name`. `arguments` is a JSON object; `id` is what the model gave it, if anything."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


def parse_tools(text: str, source: str) -> list[dict[str, Any]]:
    """The tools of a JSON file: a list of functions, bare or as `{"type": "function", "function": {…}}`.

    Raises:
        UsageError: it is something else; `source` names it.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is no JSON: {error}", _TOOL) from None
    tools = found if isinstance(found, list) else [found]
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools]
    for number, function in enumerate(functions, 1):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UsageError(
                f"tool {number} in {source} has no name",
                _TOOL,
            )
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return [{"type": "function", "function": empty | function} for function in functions if function]


def parse_calls(token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[ToolCall]]:
    """What an answer says beside its calls, and these.

    Raises:
        QualityError: a call cannot be read.
    """
    segments = list(_segments(token_ids, tokenizer))
    text = "".join(text for name, text in segments if name not in _FRAMES)
    calls = list(_framed(segments))
    for tagged in _TAGGED.findall(text):
        calls += _from_json(tagged)
    return _TAGGED.sub("", text).strip(), calls


def _segments(token_ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[str | None, str]]:
    """The text behind each control token, with its name; None for what comes before the first."""
    name, ids = None, list[int]()
    for token_id in token_ids:
        control = tokenizer.control_name(token_id)
        if control is None:
            ids.append(token_id)
        else:
            yield name, tokenizer.decode(ids)
            name, ids = control, []
    yield name, tokenizer.decode(ids)


def _framed(segments: Sequence[tuple[str | None, str]]) -> Iterator[ToolCall]:
    """Calls behind `[TOOL_CALLS]`: a JSON list (v2 to v7), or a name, perhaps an id, and `[ARGS]` (v11 and later)."""
    name, call_id = "", None
    for control, text in segments:
        if control == "[TOOL_CALLS]" and text.lstrip().startswith(("[", "{")):
            yield from _from_json(text)
        elif control == "[TOOL_CALLS]":
            if name:
                raise _unreadable(name)
            name, call_id = text.strip(), None
        elif control == "[CALL_ID]":
            call_id = text.strip()
        elif control == "[ARGS]":
            yield ToolCall(name, _arguments(text), call_id)
            name = ""
    if name:  # it was cut off before its arguments
        raise _unreadable(name)


def _from_json(text: str) -> list[ToolCall]:
    found = _read(text)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise _unreadable(text)
    return [
        ToolCall(
            call["name"],
            _arguments(call.get("arguments", {})),
            call["id"] if isinstance(call.get("id"), str) else None,
        )
        for call in calls
    ]


def _arguments(value: Any) -> dict[str, Any]:
    """A JSON object, or a text that is one."""
    found = _read(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise _unreadable(str(value))
    return found


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _unreadable(text) from None


def _unreadable(text: str) -> QualityError:
    return QualityError(
        f"the model wrote a call that is no JSON of a name and arguments: {text.strip()[:200]!r}",
        "ask again, with a lower --temperature or a higher --max-tokens",
    )
