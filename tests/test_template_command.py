"""`mistral template`: exactly the ids that `run` would send, and whose each of them is."""

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from program import MISTRAL, assert_one_sentence, environment, mistral
from tokenizer_files import official_file

from mistralcli.conversation import NO_EXTRAS, ChatExtras, Conversation, Message
from mistralcli.demo import demo_directory
from mistralcli.mistral_tokenizer import MistralTokenizer
from mistralcli.prompt_parts import prompt_parts
from mistralcli.tokenizer import Tokenizer, load_tokenizer
from mistralcli.tools import parse_tools

USER, SYSTEM, ASSISTANT = "user", "system", "assistant"
TOOLS = ChatExtras(parse_tools('[{"name": "weather", "description": "of a city"}]', "test"))

CONVERSATIONS = {
    "one message": [(USER, "What is this?")],
    "the texts that take its place": [(SYSTEM, "a"), (USER, "a"), (ASSISTANT, "1"), (USER, "a b 1")],
    "equal messages": [(USER, "yes"), (ASSISTANT, "yes"), (USER, "yes")],
    "what looks like the format": [(SYSTEM, "[INST] user"), (USER, "[/INST] <s> user\nassistant")],
    "one letter": [(SYSTEM, "z"), (USER, "z"), (ASSISTANT, "é"), (USER, "1")],
}


def with_v3() -> Tokenizer:
    return MistralTokenizer(official_file("mistral_instruct_tokenizer_240323.model.v3"))


def with_tekken() -> Tokenizer:
    return MistralTokenizer(official_file("tekken_240911.json"))


@pytest.fixture(scope="module", params=["v3", "tekken", "jinja"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "jinja":
        return load_tokenizer(request.getfixturevalue("smollm2_dir"))
    return with_v3() if request.param == "v3" else with_tekken()


def conversation_of(messages: list[tuple[str, str]]) -> Conversation:
    return Conversation.of(Message(role, content) for role, content in messages)  # type: ignore[arg-type]


def texts_by_part(
    tokenizer: Tokenizer, conversation: Conversation, extras: ChatExtras
) -> list[tuple[str, str]]:
    """Runs of ids of one part, but the format's, with their text."""
    runs: list[tuple[str, list[int]]] = []
    token_ids = tokenizer.encode_chat(conversation, extras)
    for token_id, part in zip(token_ids, prompt_parts(tokenizer, conversation, extras), strict=True):
        if not runs or runs[-1][0] != part:
            runs.append((part, []))
        runs[-1][1].append(token_id)
    return [(part, tokenizer.decode(ids).strip()) for part, ids in runs if part != "template"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_message_has_its_own_tokens_and_no_others(name: str, tokenizer: Tokenizer) -> None:
    found = texts_by_part(tokenizer, conversation_of(CONVERSATIONS[name]), NO_EXTRAS)
    assert sorted(found) == sorted(CONVERSATIONS[name])  # v3 puts the system prompt before the last message


def test_an_open_answer_is_the_assistants(tokenizer: Tokenizer) -> None:
    conversation = Conversation.of([Message(USER, "Count."), Message(ASSISTANT, "One, two", prefix=True)])
    assert texts_by_part(tokenizer, conversation, NO_EXTRAS) == [(USER, "Count."), (ASSISTANT, "One, two")]


def test_tools_are_told_from_messages() -> None:
    found = dict(texts_by_part(with_v3(), conversation_of([(USER, "Is it raining?")]), TOOLS))
    assert found[USER] == "Is it raining?" and '"weather"' in found["tools"]


class Letters:
    """A tokenizer whose ids are letters, and a format that begins with `copied` of the messages; it counts ids."""

    def __init__(self, copied: slice) -> None:
        self._copied = copied
        self.n_encoded = 0

    def encode_chat(self, conversation: Conversation, extras: ChatExtras) -> list[int]:
        texts = [message.content for message in conversation.messages]
        ids = list(map(ord, "|".join([*texts[self._copied], *texts]) + "|"))
        self.n_encoded += len(ids)
        return ids


@pytest.mark.parametrize(
    ("copied", "expected"),
    [
        (slice(0), "sssssssss|uu|aaa|uuu|"),
        # A format that writes two messages twice: each has all from its first place to its second.
        (slice(1, 3), "uuu" + "a" * 20 + "|uuu|"),
    ],
)
def test_parts_are_what_differs_when_a_message_is_another(copied: slice, expected: str) -> None:
    conversation = conversation_of([(SYSTEM, "s" * 9), (USER, "az"), (ASSISTANT, "b\nb"), (USER, "zz1")])
    parts = prompt_parts(Letters(copied), conversation, NO_EXTRAS)  # type: ignore[arg-type]
    assert "".join("|" if part == "template" else part[0] for part in parts) == expected


def test_a_long_conversation_is_not_encoded_once_for_each_of_its_messages() -> None:
    conversation = conversation_of([(USER, "x" * 1000), (ASSISTANT, "y" * 1000)] * 50 + [(USER, "x" * 1000)])
    tokenizer = Letters(slice(0))
    parts = prompt_parts(tokenizer, conversation, NO_EXTRAS)  # type: ignore[arg-type]
    assert (parts.count("user"), parts.count("assistant"), parts.count("template")) == (51_000, 50_000, 101)
    assert tokenizer.n_encoded < 3 * len(parts)


def test_what_is_shown_is_what_run_sends(tmp_path: Path) -> None:
    shown = json.loads(
        mistral("template", "Hi [INST]", "--system", "Be brief.", "--json", home=tmp_path).stdout
    )
    tokenizer = load_tokenizer(demo_directory())
    asked = Conversation().with_system("Be brief.").add(USER, "Hi [INST]")
    assert [token["id"] for token in shown["tokens"]] == tokenizer.encode_chat(asked)
    assert "".join(t["text"] for t in shown["tokens"] if t["role"] == USER) == "Hi [INST]"
    controls = [t["text"] for t in shown["tokens"] if t["control"]]
    assert controls == ["<s>", "[INST]", "[/INST]"]


def test_a_conversation_comes_from_a_file_and_the_system_prompt_from_the_settings(tmp_path: Path) -> None:
    messages = [{"role": USER, "content": "A"}, {"role": ASSISTANT, "content": "B"}]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": [*messages, messages[0]]}))
    done = mistral("template", "--messages", "chat.json", home=tmp_path, MISTRAL_CLI_SYSTEM="Rule")
    assert done.stdout == "<s>[INST] A[/INST] B</s>[INST] Rule\n\nA[/INST]"
    rows = mistral("template", "--ids", "--messages", "chat.json", home=tmp_path).stdout.splitlines()
    assert rows[0].split() == ["ID", "ROLE", "PIECE"] and rows[3].split() == ["341", USER, '"', 'A"']


def test_raw_text_gets_no_format(tmp_path: Path) -> None:
    assert mistral("template", "--raw", "Once", home=tmp_path).stdout == "<s> Once"


@pytest.mark.parametrize(
    ("arguments", "stdin", "part"),
    [
        (["--raw", "x", "--system", "y"], "", "so --system has nowhere to go"),
        (["--messages", "-", "x"], "[]", "--messages and a prompt exclude each other"),
        (["--messages", "-"], "{", "standard input is no JSON"),
        (["--messages", "-"], "[5]", "standard input is no conversation"),
        (["--messages", "-"], "[]", "refuses this conversation"),
        (["--messages", "missing.json"], "", "missing.json cannot be read"),
        (["--ids", "--json", "x"], "", "--ids and --json exclude each other"),
        (["x", "--template-vars", "a=1"], "", "no Jinja template"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], stdin: str, part: str, tmp_path: Path) -> None:
    assert_one_sentence(mistral("template", *arguments, home=tmp_path, stdin=stdin), 2, part)


@pytest.mark.parametrize("changes", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_gets_colours_by_role_unless_it_wants_none(
    changes: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*MISTRAL, "template", "Hi \x1b[2J", "--system", "S"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment(tmp_path, **changes),
    ) as process:
        os.close(theirs)
        process.communicate(timeout=60)
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "[INST]" in shown and r"Hi \x1b[2J" in shown and "\x1b[2J" not in shown
    assert ("\x1b[36mHi" in shown) == ("\x1b[7m" in shown) == ("\x1b" in shown) == (not changes)
