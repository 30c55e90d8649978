"""Which files of a repository are downloaded, from its listing alone."""

import pytest

from mistralcli.errors import IntegrityError, ModelNotFoundError
from mistralcli.hub_files import RemoteFile, choose_files

MODEL = "mistralai/tiny"


def listed(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 10, "0" * 40) for name in names]


def chosen(*names: str) -> set[str]:
    return {file.name for file in choose_files(MODEL, listed(*names))}


def test_hugging_face_weights_are_taken_where_both_layouts_are_whole() -> None:
    names = ("params.json", "consolidated.safetensors", "config.json", "model.safetensors", "tokenizer.json")
    assert chosen(*names) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_shards_come_with_their_index() -> None:
    names = ["config.json", "model.safetensors.index.json"]
    names += [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert chosen(*names) == set(names)


@pytest.mark.parametrize(
    "lost", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
)
def test_mistral_weights_are_taken_where_hugging_face_s_are_not_whole(lost: str) -> None:
    names = {"config.json", "model.safetensors.index.json", "params.json", "consolidated.safetensors"}
    names |= {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert chosen(*names - {lost}) == {"params.json", "consolidated.safetensors"}


def test_only_what_a_model_needs_is_taken() -> None:
    needed = {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tekken.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "LICENSE",
    }
    others = {
        "README.md",
        ".gitattributes",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.onnx",
        "model-q4.gguf",
        "picture.png",
        "modeling_custom.py",
        "onnx/config.json",
        "original/model.safetensors",
        "model.fp16.safetensors",
        "tokenizer.model.exe",
    }
    assert chosen(*needed, *others) == needed


def test_the_configuration_is_first_and_the_weights_are_last() -> None:
    files = choose_files(MODEL, listed("tokenizer.json", "model.safetensors", "config.json"))
    assert [file.name for file in files] == ["config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/etc/passwd",
        "a/../../x",
        "tokenizer.model/../../x",
        "..\\x",
        "a//b",
        "./x",
        "",
        "x\x1b[2J",
        "a\nb",
    ],
)
def test_a_name_that_could_leave_its_directory_is_refused_and_shown_escaped(name: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        choose_files(MODEL, listed("config.json", "model.safetensors", name))
    assert repr(name) in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        (["model-q4.gguf"], "GGUF"),
        (["config.json", "pytorch_model.bin"], "pickles"),
        (["config.json", "model-00001-of-00002.safetensors"], "incomplete"),
        (["README.md", "config.json"], "no file of its 2 is weights"),
        ([], "it is empty"),
    ],
)
def test_a_repository_without_weights_that_we_read_says_what_it_holds(names: list[str], holds: str) -> None:
    with pytest.raises(ModelNotFoundError, match=holds):
        chosen(*names)
