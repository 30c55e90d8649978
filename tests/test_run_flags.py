"""`mistral run` with flags for scripts: grammars, JSON lines, log-probabilities, tools, gaps, prompts too long."""

import json
from pathlib import Path

import pytest
from program import assert_one_sentence, mistral

SCHEMA = """{
    "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": false
}"""


def run(tiny: Path, home: Path, *arguments: str | Path, stdin: str = "") -> str:
    done = mistral("run", *arguments, "-m", tiny, "--seed", "1", home=home, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_answer_fits_the_schema_and_one_that_is_cut_off_ends_with_10(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    arguments = ("Is it?", "--schema", "schema.json")
    assert json.loads(run(tiny_model_dir, tmp_path, *arguments)) in ({"yes": True}, {"yes": False})
    cut = mistral("run", *arguments, "-m", tiny_model_dir, "-n", "2", home=tmp_path)
    assert cut.returncode == 10 and "before it was whole" in cut.stderr


def test_lines_of_json_add_up_to_the_answer_with_the_log_probability_of_each_token(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    flags = ("Hello", "-n", "8", "-t", "0", "--logprobs", "2")
    *pieces, whole = map(json.loads, run(tiny_model_dir, tmp_path, *flags, "--ndjson").splitlines())
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [i for piece in pieces for i in piece["token_ids"]] == whole["token_ids"] and whole["seed"] == 1
    tokens = [token for piece in pieces for token in piece["logprobs"]]
    assert [token["token_id"] for token in tokens] == whole["token_ids"]
    for token in tokens:  # greedy: the likeliest is the one
        assert token["top"][0]["token_id"] == token["token_id"] and len(token["top"]) == 2
        assert token["top"][1]["logprob"] <= token["top"][0]["logprob"] == token["logprob"] < 0
    assert json.loads(run(tiny_model_dir, tmp_path, *flags, "--json"))["logprobs"] == tokens


def test_what_is_too_long_loses_its_tail_or_its_head_when_that_is_asked_for_and_this_is_said(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("one " + "two " * 2000 + "three")
    flags = ("-f", "long.txt", "-m", tiny_model_dir, "-n", "4", "--json")
    assert_one_sentence(mistral("run", *flags, home=tmp_path), 8, "2005 tokens", "1024")
    for end in ("head", "tail"):
        done = mistral("run", *flags, "--overflow", end, home=tmp_path)
        assert done.returncode == 0, done.stderr
        usage = json.loads(done.stdout)["usage"]
        assert 1000 <= usage["prompt_tokens"] <= 1020 and usage["completion_tokens"] == 4
        assert "tokens of its text were left out" in done.stderr


def test_tools_gaps_and_system_files_reach_the_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "weather"}]')
    (tmp_path / "system.txt").write_text("Be brief.\n")

    def n_prompt(*flags: str) -> int:
        found: int = json.loads(run(tiny_model_dir, tmp_path, *flags, "-n", "2", "--json"))["usage"][
            "prompt_tokens"
        ]
        return found

    plain = n_prompt("Hello")
    assert n_prompt("Hello", "--tools", "tools.json") > plain + 20
    assert (
        n_prompt("Hello", "--system-file", "system.txt") == n_prompt("Hello", "--system", "Be brief.") > plain
    )
    assert n_prompt("Hello", "--fim", "--suffix", "there") == 5  # <s> [SUFFIX] there [PREFIX] ▁Hello


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (["--json", "--ndjson"], "--json and --ndjson"),
        (["--logprobs", "2"], "--logprobs"),
        (["--regex", "a", "--schema", "x.json"], "--schema and --regex"),
        (["--suffix", "a"], "--suffix is for --fim"),
        (["--fim", "--system", "a"], "--fim uses no template"),
        (["--raw", "--tools", "tools.json"], "--raw uses no template"),
        (["--tools", "missing.json"], "missing.json cannot be read"),
        (["--overflow", "middle"], "--overflow is middle"),
        (["--template-vars", "a"], "--template-vars 'a' is not NAME=VALUE"),
        (["--template-vars", "a=1"], "no Jinja template"),
        (["--regex", "[a"], "the regex cannot be used"),
        (["--system", "a", "--system-file", "b"], "--system and --system-file"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tiny_model_dir: Path, tmp_path: Path, flags: list[str], fact: str
) -> None:
    (tmp_path / "tools.json").write_text("[]")
    (tmp_path / "x.json").write_text("{}")
    if "--raw" in flags:
        (tmp_path / "tools.json").write_text('[{"name": "a"}]')
    assert_one_sentence(mistral("run", "Hi", "-m", tiny_model_dir, *flags, home=tmp_path), 2, fact)
