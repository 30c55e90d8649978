"""`mistral tokenize`: every character counts, nothing invisible stays so, and no weights are read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from program import assert_one_sentence, environment, mistral
from test_architecture import HEAVY

from mistralcli.cli.token_text import quoted, tokens_of
from mistralcli.demo import demo_directory
from mistralcli.tokenizer import load_tokenizer

HOSTILE = 'é [INST] </s>\x1b[31m\t\u202e🙂\\"\n'


def test_pieces_join_to_the_text_and_none_is_a_control_token(tmp_path: Path) -> None:
    done = mistral("tokenize", "--json", home=tmp_path, stdin=HOSTILE)
    tokens = json.loads(done.stdout)["tokens"]
    assert bytes.fromhex("".join(token["bytes"] for token in tokens)).decode() == " " + HOSTILE
    assert not any(token["control"] for token in tokens)
    assert len(tokens) == json.loads(done.stdout)["n_tokens"]


def test_the_table_shows_controls_as_escapes_also_in_a_pipe(tmp_path: Path) -> None:
    done = mistral("tokenize", HOSTILE, home=tmp_path)
    assert r'"\x1b"' in done.stdout and r'"\t"' in done.stdout and r'"\n"' in done.stdout
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    n_rows = len(done.stdout.splitlines()) - 1
    ids = mistral("tokenize", "--ids", HOSTILE, home=tmp_path).stdout
    assert len(ids.split()) == n_rows and ids.count("\n") == 1
    assert mistral("tokenize", "--count", "-", home=tmp_path, stdin=HOSTILE).stdout == f"{n_rows}\n"


def test_the_ids_are_those_of_the_tokenizer() -> None:
    tokenizer = load_tokenizer(demo_directory())
    token_ids = tokenizer.encode("Once upon a time", bos=True)
    tokens = tokens_of(tokenizer, token_ids)
    assert [token.token_id for token in tokens] == token_ids
    assert tokens[0].shown == "<s>" and tokens[1].shown == '" Once"'


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\xf0\x9f", r'"\xf0\x9f"'),
        (b'a"\\', r'"a\"\\"'),
        ("\u200b\u2028\xa0\U000e0001".encode(), r'"\u200b\u2028\xa0\U000e0001"'),
        ("日本 é".encode(), '"日本 é"'),
    ],
)
def test_what_is_no_visible_character_is_written_out(data: bytes, shown: str) -> None:
    assert quoted(data) == shown


@pytest.mark.parametrize(
    ("arguments", "exit_code", "part"),
    [
        (["--ids", "--count", "x"], 2, "--ids, --count and --json exclude each other"),
        (["-m", "nobody/nothing", "x"], 3, "nobody/nothing is not on this machine"),
        (["-m", "", "x"], 3, "the model's name is empty"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], exit_code: int, part: str, tmp_path: Path) -> None:
    assert_one_sentence(mistral("tokenize", *arguments, home=tmp_path), exit_code, part)


def test_text_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    done = mistral("tokenize", home=tmp_path, stdin=b"\xff")
    assert_one_sentence(done, 2, "standard input is not UTF-8 text")


@pytest.mark.parametrize("command", ["tokenize", "template"])
def test_neither_torch_nor_the_weights_are_loaded(command: str, tmp_path: Path) -> None:
    code = "import sys; from mistralcli.cli.app import main; main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "Hi"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env=environment(tmp_path),
    )
    assert done.stdout
    assert not set(done.stderr.split()) & (
        set(HEAVY) & {"torch", "safetensors", "transformers", "bitsandbytes"}
    )
