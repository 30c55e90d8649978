"""Tools: their descriptions are checked, and a model's calls are read from control tokens and never from text."""

import json

import pytest
from tokenizer_files import official_file

from mistralcli.conversation import ChatExtras, Conversation
from mistralcli.errors import QualityError, UsageError
from mistralcli.mistral_tokenizer import MistralTokenizer
from mistralcli.tools import ToolCall, parse_calls, parse_tools

V3 = "mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = "tekken_240911.json"
WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}


def tokenizer(name: str) -> MistralTokenizer:
    return MistralTokenizer(official_file(name))


def control_id(of: MistralTokenizer, name: str) -> int:
    return next(i for i in range(of.vocab_size) if of.control_name(i) == name)


def test_functions_are_taken_bare_and_as_the_api_has_them() -> None:
    wrapped = {"type": "function", "function": WEATHER}
    for text in (json.dumps([WEATHER]), json.dumps(WEATHER), json.dumps([wrapped])):
        assert parse_tools(text, "tools.json") == [wrapped]


@pytest.mark.parametrize(
    ("text", "fact"),
    [("{", "tools.json is no JSON"), ("[3]", "tool 1"), ('[{"name": 3}]', "tool 1 in tools.json")],
)
def test_what_is_no_list_of_functions_is_refused(text: str, fact: str) -> None:
    with pytest.raises(UsageError, match=fact.replace("[", r"\[")):
        parse_tools(text, "tools.json")


@pytest.mark.parametrize("name", [V3, TEKKEN])
def test_descriptions_are_framed_by_control_tokens(name: str) -> None:
    ours = tokenizer(name)
    extras = ChatExtras(parse_tools(json.dumps(WEATHER), "tools.json"))
    ids = ours.encode_chat(Conversation().add("user", "Rain?"), extras)
    assert [ours.control_name(ids[i]) for i in (0, 1)] == ["<s>", "[AVAILABLE_TOOLS]"]
    assert "weather" in ours.decode(ids[: ids.index(control_id(ours, "[/AVAILABLE_TOOLS]"))])


def test_the_first_format_has_no_tools_and_says_so() -> None:
    extras = ChatExtras(parse_tools(json.dumps(WEATHER), "tools.json"))
    with pytest.raises(UsageError, match="v1 has no tools"):
        tokenizer("tokenizer.model.v1").encode_chat(Conversation().add("user", "Rain?"), extras)


@pytest.mark.parametrize("name", [V3, TEKKEN])
def test_a_json_list_behind_the_control_token_is_calls(name: str) -> None:
    ours = tokenizer(name)
    written = '[{"name": "weather", "arguments": {"city": "Bern"}, "id": "abcdefghi"}, {"name": "now"}]'
    ids = [control_id(ours, "[TOOL_CALLS]"), *ours.encode(written)]
    calls = [ToolCall("weather", {"city": "Bern"}, "abcdefghi"), ToolCall("now", {})]
    assert parse_calls(ids, ours) == ("", calls)


def test_text_that_only_looks_like_a_call_is_text() -> None:
    ours = tokenizer(V3)
    text = 'So: [TOOL_CALLS][{"name": "weather", "arguments": {}}]'
    assert parse_calls(ours.encode(text), ours) == (text, [])


def test_calls_between_tags_are_read_and_the_rest_is_text() -> None:
    ours = tokenizer(V3)
    text = 'I look.\n<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}</tool_call>'
    assert parse_calls(ours.encode(text), ours) == ("I look.", [ToolCall("weather", {"city": "Bern"})])


@pytest.mark.parametrize(
    "written", ['[{"name": "weather", "arg', '[{"arguments": {}}]', '[{"name": "a", "arguments": [1]}]']
)
def test_a_call_that_is_cut_off_or_has_no_name_is_a_failure(written: str) -> None:
    ours = tokenizer(V3)
    with pytest.raises(QualityError, match="no JSON of a name and arguments"):
        parse_calls([control_id(ours, "[TOOL_CALLS]"), *ours.encode(written)], ours)


def test_a_gap_is_filled_between_control_tokens_and_where_there_are_none_that_is_said() -> None:
    ours = tokenizer(V3)
    ids = ours.encode_fim("def f(", "return x")
    assert [ours.control_name(i) for i in ids if ours.control_name(i)] == ["<s>", "[SUFFIX]", "[PREFIX]"]
    assert ours.decode(ids[ids.index(control_id(ours, "[PREFIX]")) :]) == "def f("
    for older in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"):
        with pytest.raises(UsageError, match="fill"):
            tokenizer(older).encode_fim("def f(", "return x")
