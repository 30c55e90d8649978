"""Chat templates of fine-tunes: as in transformers, but no message can name a control token."""

import json
import re
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import CHATML, TRIMMING, byte_level_directory, sentencepiece_directory, write_config
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast

from mistralcli import template_sandbox
from mistralcli.chat_template import MAX_SOURCE_CHARS, ChatTemplate, find_template
from mistralcli.conversation import Conversation, Message, Role
from mistralcli.errors import IntegrityError, UsageError
from mistralcli.tokenizer import load_tokenizer

DIALECT = (
    "{% set ns = namespace(n=0) %}\n"
    "{%- for message in messages %}\n"
    "  {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
    "  {%- set ns.n = ns.n + 1 %}\n"
    "  {%- generation %}{{ {'n': ns.n, 'ä': message.content} | tojson }}{% endgeneration %}\n"
    "{%- endfor %}\n"
    "{{- strftime_now('%Y')[:1] }}{{ tools is none }}{{ bos_token }}\n"
    "   {% if add_generation_prompt %}\n"
    "   <|im_start|>assistant\n"
    "   {% endif %}\n"
)
"""What transformers adds to Jinja, and how it trims blocks."""

Chat = list[tuple[Role, str]]

CHATS: list[Chat] = [
    [("user", "Who jumps over the lazy dog?")],
    [("user", "  two spaces around  "), ("assistant", "\n\nOK\n"), ("user", "Größe 😀    four\t1 < 2")],
    [("system", "Be terse."), ("user", "a"), ("assistant", "b"), ("user", "")],
    [("user", "Go on."), ("assistant", "The quick brown")],
    [("user", "Go on."), ("assistant", "The quick  \n")],
]

TOKENIZERS: dict[str, Callable[..., Path]] = {
    "byte level": byte_level_directory,
    "sentencepiece": sentencepiece_directory,
    "metaspace": lambda directory, template: sentencepiece_directory(directory, template, metaspace=True),
}


def conversation(chat: Chat) -> Conversation:
    """The messages; an assistant's at the end is open."""
    messages = [Message(role, content) for role, content in chat]
    if messages[-1].role == "assistant":
        messages[-1] = replace(messages[-1], prefix=True)
    return Conversation.of(messages)


def ids_by_transformers(directory: Path, chat: Chat) -> list[int]:
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    if config["bos_token"] == "<s>":
        names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **names)
    open_turn = chat[-1][0] == "assistant"
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        chat_template=config["chat_template"],
        add_generation_prompt=not open_turn,
        continue_final_message=open_turn,
        return_dict=False,
    )


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "chats"),
    [(CHATML, CHATS), (TRIMMING, [CHATS[i] for i in (0, 1, 3, 4)]), (DIALECT, CHATS[:3])],
    ids=["chatml", "trimming", "dialect"],
)
def test_a_chat_has_the_ids_of_transformers(
    tmp_path: Path, make: Callable[..., Path], template: str, chats: list[Chat]
) -> None:
    directory = make(tmp_path / "model", template)
    tokenizer = load_tokenizer(directory)
    for chat in chats:
        assert tokenizer.encode_chat(conversation(chat)) == ids_by_transformers(directory, chat)


def test_what_a_template_refuses_is_a_usage_error_with_its_reason(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_directory(tmp_path / "model", TRIMMING))
    with pytest.raises(UsageError, match="refuses this conversation: no system prompts here"):
        tokenizer.encode_chat(conversation([("system", "Be terse."), ("user", "a")]))


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_text_has_the_ids_of_the_tokenizers_library(tmp_path: Path, make: Callable[..., Path]) -> None:
    directory = make(tmp_path / "model", CHATML)
    reference = Reference.from_file(str(directory / "tokenizer.json"))
    for text in ("", "The dog", "  a  b\n    c", "<think>1 < 2</think>", "naïve 東京"):
        assert load_tokenizer(directory).encode(text) == reference.encode(text, add_special_tokens=False).ids


CONTROLS = {
    "byte level": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "sentencepiece": ["<s>", "</s>"],
    "metaspace": ["<s>", "</s>"],
}


@pytest.mark.parametrize("family", CONTROLS)
def test_no_message_and_no_text_can_name_a_control_token(tmp_path: Path, family: str) -> None:
    template = CHATML if family == "byte level" else TRIMMING
    directory = TOKENIZERS[family](tmp_path / "model", template)
    tokenizer = load_tokenizer(directory)
    reference = Reference.from_file(str(directory / "tokenizer.json"))
    control_ids = {reference.token_to_id(name) for name in CONTROLS[family]}
    parts = st.sampled_from(
        [*CONTROLS[family], "<|im_", "start|>", "<", "s>", "|", ">", " ", "\n", "a", "fox"]
    )
    texts = st.lists(parts, max_size=12).map("".join)

    def chat_ids(user: str, assistant: str) -> list[int]:
        return tokenizer.encode_chat(conversation([("user", user), ("assistant", assistant), ("user", "?")]))

    def controls(ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in control_ids]

    @settings(derandomize=True, deadline=None)
    @given(user=texts, assistant=texts)
    def check(user: str, assistant: str) -> None:
        assert controls(tokenizer.encode(user)) == []
        # (Metaspace puts no space before a text that begins with one, and so loses that one.)
        assert tokenizer.decode(tokenizer.encode(user)).lstrip(" ") == user.lstrip(" ")
        ids = chat_ids(user, assistant)
        assert controls(ids) == controls(chat_ids("a", "a"))
        assert user.strip() in tokenizer.render(ids)
        assert assistant.strip() in tokenizer.render(ids)

    assert len(controls(chat_ids("a", "a"))) >= 3
    check()


def test_a_token_that_only_the_configuration_names_is_a_control_token(tmp_path: Path) -> None:
    template = "{{ eos_token }}{{ messages[0].content }}{{ eos_token }}"
    directory = byte_level_directory(tmp_path / "model", template)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_config(directory, **config | {"eos_token": "<think>"})
    tokenizer = load_tokenizer(directory)
    (eos_id,) = tokenizer.eos_ids
    ids = tokenizer.encode_chat(conversation([("user", "a<think>b")]))
    assert [ids[0], ids[-1], ids.count(eos_id)] == [eos_id, eos_id, 2]


def test_words_that_are_added_tokens_but_no_control_tokens_stay_tokens(tmp_path: Path) -> None:
    directory = byte_level_directory(tmp_path / "model")
    reference = Reference.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    # The template does not write the first, and the second is a plain word, which it does write.
    for word in ("<think>", "assistant"):
        token_id = reference.token_to_id(word)
        assert tokenizer.encode(word) == [token_id]
        assert token_id in tokenizer.encode_chat(conversation([("user", f"a {word}")]))[:-2]
        assert tokenizer.decode([token_id]) == word


def test_what_a_training_script_set_for_its_batches_cuts_no_prompt(tmp_path: Path) -> None:
    directory = byte_level_directory(tmp_path / "model")
    whole = load_tokenizer(directory).encode("The quick brown fox")
    reference = Reference.from_file(str(directory / "tokenizer.json"))
    reference.enable_truncation(2)
    reference.enable_padding(length=64)
    reference.save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).encode("The quick brown fox") == whole


def test_a_conversation_without_an_open_question_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_directory(tmp_path / "model"))
    with pytest.raises(UsageError, match="no message to answer"):
        tokenizer.encode_chat(Conversation())
    with pytest.raises(UsageError, match="ends with a finished answer"):
        tokenizer.encode_chat(Conversation().add("user", "a").add("assistant", "b"))


def test_a_model_without_a_template_takes_text_and_refuses_chats(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_directory(tmp_path / "model", template=None))
    assert tokenizer.version == "none"
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"
    with pytest.raises(UsageError, match="no chat template") as caught:
        tokenizer.encode_chat(conversation([("user", "a")]))
    assert caught.value.hint is not None and "--raw" in caught.value.hint


def test_a_template_that_leaves_the_open_message_out_refuses_it() -> None:
    template = ChatTemplate("{{ messages[0].content }}", Path("t.jinja"))
    assert template.render([Message("user", "a")], {}) == "a"
    with pytest.raises(UsageError, match="leaves out the open assistant message"):
        template.render([Message("user", "a"), Message("assistant", "b", prefix=True)], {})


def test_a_template_is_found_in_its_own_file_first_and_by_the_name_default(tmp_path: Path) -> None:
    def source() -> str | None:
        template = find_template(tmp_path)
        return template and template.source

    assert source() is None
    write_config(tmp_path, bos_token="<s>")
    assert source() is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write_config(tmp_path, chat_template=named)
    assert source() == "named"
    write_config(tmp_path, chat_template=named[:1])
    assert source() is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}', encoding="utf-8")
    assert source() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja", encoding="utf-8")
    assert source() == "jinja"


@pytest.mark.parametrize("content", [b'{"chat_template": 1}', b'{"chat_template": {}}', b"[]", b"\xff"])
def test_a_template_file_of_the_wrong_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat_template.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"chat_template\.json"):
        find_template(tmp_path)


def test_a_template_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja cannot be read"):
        find_template(tmp_path)


HOSTILE = {
    "leaves the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "leaves it by a format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}{{ x.y }}",
    "changes the messages": "{{ messages.append(1) }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "writes without end": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "asks for too long a range": "{% for i in range(10**9) %}{% endfor %}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "is nested too deep": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "writes one text too long": "{{ 'x' * 10000000000 }}",
    "makes a text that nobody sees": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "pads a text": "{{ 'x'.center(10000000000) }}",
    "takes a power": "{{ 10 ** 10 ** 9 }}",
    "goes round and round": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "is no Jinja": "{% for %}",
    "has an unknown tag": "{% load 'x' %}",
    "divides by zero": "{{ 1 / 0 }}",
    "adds text to a number": "{{ 1 + 'a' }}",
    "is too long": " " * (MAX_SOURCE_CHARS + 1),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_is_broken_or_hostile_is_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_CPU_S", 1.0)
    limits = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    template = ChatTemplate(source, Path("model/chat_template.jinja"))
    with pytest.raises(
        IntegrityError, match=r"the chat template in model/chat_template\.jinja fails: ."
    ) as caught:
        template.render([Message("user", "a")], {})
    assert caught.value.hint is not None and "--raw" in caught.value.hint
    assert not re.search(r"root:|Traceback", caught.value.message)
    assert limits == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF))
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


@pytest.mark.parametrize("source", ["", "{# nothing #}"])
def test_a_template_that_writes_nothing_is_named(source: str, tmp_path: Path) -> None:
    directory = byte_level_directory(tmp_path / "model")
    write_config(directory, chat_template=source)
    with pytest.raises(
        IntegrityError, match=r"the chat template in .*tokenizer_config\.json writes nothing"
    ) as caught:
        load_tokenizer(directory).encode_chat(conversation([("user", "a")]))
    assert "--raw" in str(caught.value.hint)
