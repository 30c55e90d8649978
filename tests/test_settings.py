"""Settings files: what they may set, what counts more, where a value comes from, and aliases."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from hub_models import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from program import assert_one_sentence, environment, mistral

from mistralcli import store
from mistralcli.cli.app import app, load_command, main
from mistralcli.cli.defaults import variable
from mistralcli.cli.options import SETTINGS
from mistralcli.doctor import Context, Finding, examine
from mistralcli.doctor.settings import check_settings
from mistralcli.errors import ModelNotFoundError, UsageError
from mistralcli.settings import nearest_project_file, project_path, read_file, read_settings, user_path

OTHERS = {"named", "raw", "fim", "suffix", "system_file", "prompt", "file", "stop"}
"""Flags of run and chat that no file sets."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directories are under the test's; the working directory is a project there."""
    for name in os.environ:
        if name.startswith(("MISTRAL_CLI_", "HF_")):
            monkeypatch.delenv(name)
    for name, value in environment(tmp_path).items():
        if name.startswith("XDG_"):
            monkeypatch.setenv(name, value)
    (tmp_path / "work" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deeper")
    return tmp_path


def write_user(text: str) -> Path:
    user_path().parent.mkdir(parents=True, exist_ok=True)
    user_path().write_text(text)
    return user_path()


def write_project(text: str) -> Path:
    path = Path.cwd().parent / ".mistral.toml"
    path.write_text(text)
    return path


def parsed(command: str, *arguments: str) -> dict[str, Any]:
    """What a command is called with, by the program's own way from its arguments."""
    found = typer.main.get_command(app).get_command(None, command)
    return dict(found.make_context(command, list(arguments)).params)


def program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["mistral", *arguments])
    code = main()
    return code, *capfd.readouterr()


def add_build(name: str) -> Path:
    return write_checkpoint(store.models_directory() / name)


# What counts more


def test_a_flag_counts_more_than_a_variable_a_project_s_file_and_the_user_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for command in ("run", "chat"):
        assert parsed(command)["top_k"] == 0
    write_user("top_k = 1")
    for command in ("run", "chat"):
        assert parsed(command)["top_k"] == 1
    write_project("top_k = 2")
    assert parsed("run")["top_k"] == 2
    monkeypatch.setenv("MISTRAL_CLI_TOP_K", "3")
    assert parsed("run")["top_k"] == 3
    assert parsed("run", "--top-k", "4")["top_k"] == 4
    monkeypatch.setenv("MISTRAL_CLI_TOP_K", "")
    assert parsed("run")["top_k"] == 2


EXAMPLES: dict[str, tuple[str, Any]] = {
    "system": ('"Be brief."', "Be brief."),
    "max_tokens": ("7", 7),
    "temperature": ("0", 0.0),
    "top_p": ("0.5", 0.5),
    "top_k": ("7", 7),
    "min_p": ("0.5", 0.5),
    "repeat_penalty": ("1.1", 1.1),
    "seed": ("7", 7),
    "ctx": ("2048", 2048),
    "chunk": ("64", 64),
    "slack": ("64", 64),
    "device": ('"cpu"', "cpu"),
    "dtype": ('"float32"', "float32"),
    "kv": ('"int8"', "int8"),
    "threads": ("1", 1),
    "exact": ("true", True),
    "memory_limit": ('"2 GB"', 2 * 10**9),
}


def test_every_setting_has_an_example() -> None:
    assert EXAMPLES.keys() == SETTINGS.keys()


@pytest.mark.parametrize("key", SETTINGS)
def test_each_setting_reaches_run_and_chat_from_a_file_and_from_a_variable(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = EXAMPLES[key]
    for command in ("run", "chat"):
        file = write_user(f"{key} = {text}")
        assert parsed(command)[key] == value
        file.unlink()
        monkeypatch.setenv(variable(key), text.strip('"'))
        assert parsed(command)[key] == value
        monkeypatch.delenv(variable(key))


def test_a_false_in_a_nearer_place_undoes_a_true(monkeypatch: pytest.MonkeyPatch) -> None:
    write_user("exact = true")
    assert parsed("run", "--no-exact")["exact"] is False
    monkeypatch.setenv("MISTRAL_CLI_EXACT", "false")
    assert parsed("run")["exact"] is False


def test_no_file_sets_a_flag_that_reads_or_writes_files() -> None:
    """A project's file comes from somebody else: flags with a path, and others that are no defaults, are not in."""
    for param in load_command("run").params:
        if param.type_descriptor.annotation is Path or "FILE" in str(param.metavar) or param.name in OTHERS:
            assert param.name not in SETTINGS


def test_values_for_one_model_count_more_than_those_for_all() -> None:
    write_user(
        'top_k = 1\n[models.small]\ntop_k = 2\n[models."o/n"]\ntop_k = 3\nctx = 64\n[aliases]\nsmall = "o/n@v1"'
    )
    assert parsed("run", "-m", "other")["top_k"] == 1
    assert parsed("run", "-m", "o/n")["top_k"] == 3
    assert parsed("run", "-m", "o/n@v2")["top_k"] == 3
    by_alias = parsed("run", "-m", "small")
    assert (by_alias["top_k"], by_alias["ctx"]) == (2, 64)
    assert parsed("chat", "small")["top_k"] == 2


def test_the_default_model_is_the_nearest_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write_user('model = "users"\n[models.projects]\ntop_k = 5')
    assert parsed("run")["model"] == parsed("bench")["model"] == "users"
    write_project('model = "projects"')
    assert (parsed("run")["model"], parsed("run")["top_k"]) == ("projects", 5)
    monkeypatch.setenv("MISTRAL_CLI_MODEL", "variable")
    assert parsed("run")["model"] == "variable"
    assert parsed("run", "-m", "flag")["model"] == "flag"


def test_a_default_system_prompt_gives_way_to_flags_that_exclude_one() -> None:
    write_user('system = "Be brief."')
    assert parsed("run", "--raw")["system"] is None
    assert parsed("run", "--system-file", "x")["system"] is None
    assert parsed("run")["system"] == "Be brief."


def test_help_is_given_whatever_is_in_the_files(capfd: pytest.CaptureFixture[str]) -> None:
    write_user("= nonsense")
    with pytest.raises(typer.Exit):
        parsed("run", "--help")
    assert "--temperature" in capfd.readouterr().out


# Files that cannot be used


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("temperature = ", "not TOML"),
        ("\xff", "not TOML"),
        ("a = " + "[" * 5000, "nested too deeply"),
        ("x = 1\n" * 200_000, "more than"),
        ("temprature = 1", "did you mean temperature?"),
        ("[models.x]\nmodel = 'y'", "which is no setting"),
        ("temperature = 'hot'", "sets temperature to 'hot'"),
        ("temperature = true", "takes no true or false"),
        ("exact = 1", "true or false"),
        ("ctx = 2.5", "sets ctx to 2.5"),
        ("ctx = [1]", "ctx is [1]"),
        ("ctx = 1979-05-27", "which no setting is"),
        ("memory_limit = 'much'", "memory_limit"),
        ("model = 7", "model is 7"),
        ("model = ''", "not a model's name"),
        ("models = 7", "not a table"),
        ("[models]\nx = 7", "models.x is 7"),
        ("aliases = 'x'", "not a table"),
        ("[aliases]\nx = 7", "aliases.x is 7"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(text: str, part: str) -> None:
    path = write_user("")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        parsed("run")
    said = f"{caught.value.message} {caught.value.hint}"
    assert str(path) in said and part in said and len(caught.value.message) < 400


def test_a_bad_file_fails_as_usage_and_a_fifo_is_no_file(home: Path) -> None:
    os.mkfifo(Path.cwd() / ".mistral.toml")
    assert read_settings() == []
    write_user("top_k = 1.5")
    assert_one_sentence(mistral("run", "Hello.", home=home), 2, "config.toml", "top_k")


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2)
            ),
        ),
        max_size=4,
    )
)
def test_any_toml_is_settings_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]
) -> None:
    import tomlkit

    path = tmp_path_factory.mktemp("any") / "config.toml"
    path.write_text(tomlkit.dumps(value), encoding="utf-8", errors="replace")
    for is_project in (False, True):
        try:
            read_file(path, is_project=is_project)
        except UsageError as error:
            assert str(path) in error.message


# A project's file


def test_a_project_s_file_is_the_nearest_one_above() -> None:
    assert project_path() is None
    above = write_project("")
    assert project_path() == above
    (Path.cwd() / ".mistral.toml").write_text("")
    assert project_path() == Path.cwd() / ".mistral.toml"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_another_user_s_project_file_is_ignored_and_doctor_says_so() -> None:
    path = write_project("top_k = 9")
    os.chown(path, 12345, -1)
    assert nearest_project_file() == path and read_settings() == []
    assert parsed("run")["top_k"] == 0
    assert "belongs to another user" in findings()["project settings"].message


@pytest.mark.parametrize("name", ["./model", "/etc", "~/x", "../x", "a/b/c", "a\\b", "C:/x", "a b", "x\x1b"])
def test_a_project_names_models_by_name_alone(name: str) -> None:
    for text in (f"model = {json.dumps(name)}", f"[aliases]\nx = {json.dumps(name)}"):
        write_project(text)
        with pytest.raises(UsageError, match="by name alone"):
            read_settings()


def test_a_project_s_alias_does_not_take_the_name_of_a_model_that_is_here() -> None:
    build, other = add_build("tiny"), add_build("other")
    write_project('[aliases]\ntiny = "other"\ndemo = "other"\nfree = "other"')
    assert store.resolve("tiny") == build
    assert store.resolve("demo").name == "demo_model"
    assert store.resolve("free") == other


# Aliases


def test_a_name_is_a_directory_an_alias_a_build_in_this_order() -> None:
    build, other = add_build("tiny"), add_build("other")
    write_user('[aliases]\nsmall = "tiny"\nsmaller = "small"\ntiny = "other"\n"o/n" = "tiny"')
    assert store.resolve("tiny") == other
    assert store.resolve("smaller") == other
    write_checkpoint(Path("o/n"))
    assert store.resolve("o/n") == Path("o/n")
    user_path().unlink()
    assert store.resolve("tiny") == build


def test_aliases_that_lead_back_are_refused_with_the_way() -> None:
    write_user('[aliases]\na = "b"\nb = "c"\nc = "b"')
    with pytest.raises(UsageError, match="a → b → c → b"):
        store.resolve("a")


def test_an_alias_of_nothing_says_which_model_is_missing() -> None:
    write_user('[aliases]\nsmall = "o/n"')
    with pytest.raises(ModelNotFoundError, match="o/n is not on this machine") as caught:
        store.resolve("small")
    assert caught.value.hint == "get it with: mistral pull o/n"
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve("smal")
    assert "did you mean small?" in str(caught.value.hint)


def test_alias_makes_lists_and_removes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add_build("tiny")
    assert program(monkeypatch, capfd, "alias", "small", "tiny")[0] == 0
    assert store.resolve("small") == store.models_directory() / "tiny"
    code, out, err = program(monkeypatch, capfd, "alias", "far", "o/n")
    assert code == 0 and "mistral pull o/n" in err
    write_checkpoint(Path("here"))
    assert program(monkeypatch, capfd, "alias", "local", "./here")[0] == 0
    assert store.resolve("local") == Path.cwd() / "here"
    write_project('[aliases]\ntiny = "o/n"')
    code, out, err = program(monkeypatch, capfd, "alias")
    assert "not used: a model has this name" in next(
        line for line in out.splitlines() if line.startswith("tiny")
    )
    code, out, err = program(monkeypatch, capfd, "alias", "--json")
    assert {one["name"] for one in json.loads(out)} == {"small", "far", "local", "tiny"}
    assert program(monkeypatch, capfd, "alias", "--remove", "far")[0] == 0
    assert program(monkeypatch, capfd, "alias", "--remove", "far")[0] == 2
    assert tomllib.loads(user_path().read_text())["aliases"].keys() == {"small", "local"}
    code, out, err = program(monkeypatch, capfd, "rm", "small", "--yes")
    assert code == 2 and "small is an alias of tiny" in err and store.resolve("tiny")


@pytest.mark.parametrize(
    "arguments",
    [
        ("tiny", "o/n"),
        ("demo", "o/n"),
        ("a/b", "o/n"),
        (".a", "o/n"),
        ("a@b", "o/n"),
        ("", "o/n"),
        ("a\x1b", "o/n"),
        ("b", "a"),
        ("b", "b"),
        ("b", "no name"),
        ("b",),
        ("--remove",),
        ("--remove", "b", "o/n"),
    ],
)
def test_an_alias_that_cannot_be_is_refused_and_nothing_changes(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add_build("tiny")
    before = write_user('[aliases]\na = "b"\n').read_text()
    code, out, err = program(monkeypatch, capfd, "alias", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and "\x1b" not in err
    assert user_path().read_text() == before


# mistral config


def test_config_sets_and_unsets_and_keeps_what_the_user_wrote(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = "# my settings\ntop_k = 3  # not more\n\n[aliases]\nsmall = 'o/n'  # the small one\n"
    real = write_user(mine).rename(user_path().with_name("real.toml"))
    user_path().symlink_to(real)
    steps = [
        ("set", "temperature", "0.2"),
        ("set", "top-p", "0.9"),
        ("set", "exact", "true"),
        ("set", "memory_limit", "6GB"),
        ("set", "model", "small"),
        ("set", "system", 'Be "brief".\nAlways.'),
        ("set", "--for", "o/n", "ctx", "2048"),
    ]
    for step in steps:
        assert program(monkeypatch, capfd, "config", *step)[0] == 0
    text = user_path().read_text()
    for line in mine.splitlines():
        assert line in text
    assert user_path().is_symlink() and tomllib.loads(text) == {
        "top_k": 3,
        "temperature": 0.2,
        "top_p": 0.9,
        "exact": True,
        "memory_limit": "6GB",
        "model": "small",
        "system": 'Be "brief".\nAlways.',
        "aliases": {"small": "o/n"},
        "models": {"o/n": {"ctx": 2048}},
    }
    assert parsed("run")["ctx"] == 2048
    for step in steps:
        for_model = step[1:3] if step[1] == "--for" else ()
        assert program(monkeypatch, capfd, "config", "unset", *for_model, step[-2])[0] == 0
    assert tomllib.loads(user_path().read_text()) == tomllib.loads(mine)
    assert not list(user_path().parent.glob(".*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("set", "temprature", "1"),
        ("set", "temperature", "hot"),
        ("set", "top_p", "1.5"),
        ("set", "chunk", "0"),
        ("set", "exact", "maybe"),
        ("set", "memory_limit", "much"),
        ("set", "model", ""),
        ("set", "--for", "x", "model", "y"),
        ("set", "aliases", "x"),
        ("set", "temperature"),
        ("set",),
        ("unset", "temperature"),
        ("unset", "--for", "x", "ctx"),
        ("unset", "--for", "", "temperature"),
        ("set", "--for", "", "temperature", "1"),
        ("unset", "top_k", "1"),
        ("get", "top_k"),
        ("set", "top_k", "1", "--json"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_nothing_changes(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = write_user("top_k = 1\n").read_text()
    code, out, err = program(monkeypatch, capfd, "config", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ")
    assert user_path().read_text() == before


def test_config_shows_where_each_value_comes_from(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    user = write_user(
        'model = "small"\ntop_k = 1\nctx = 64\n[models."o/n"]\nctx = 128\n[aliases]\nsmall = "o/n"'
    )
    project = write_project('top_k = 2\nsystem = "evil\\u001b]0;x"')
    monkeypatch.setenv("MISTRAL_CLI_SEED", "5")
    _, out, _ = program(monkeypatch, capfd, "config", "--json")
    rows = {(row["key"], row["model"]): (row["value"], row["source"]) for row in json.loads(out)}
    assert rows["model", None] == ("small", str(user))
    assert rows["top_k", None] == (2, str(project))
    assert rows["ctx", None] == (128, str(user))
    assert rows["seed", None] == ("5", "MISTRAL_CLI_SEED")
    assert rows["temperature", None] == (0.7, "the program")
    assert rows["ctx", "o/n"] == (128, str(user))
    assert rows["aliases.small", None] == ("o/n", str(user))
    _, out, _ = program(monkeypatch, capfd, "config")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["top_k"].split() == ["top_k", "2", str(project)] and "\x1b" not in out
    _, out, _ = program(monkeypatch, capfd, "config", "--for", "other", "--json")
    assert {row["key"]: row["value"] for row in json.loads(out)}["ctx"] == 64


def test_unset_takes_away_what_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_user("temprature = 1\n")
    assert program(monkeypatch, capfd, "config")[0] == 2
    assert program(monkeypatch, capfd, "config", "unset", "temprature")[0] == 0
    assert user_path().read_text() == ""


def test_a_file_that_cannot_be_written_is_a_disk_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "file"))
    code, _, err = program(monkeypatch, capfd, "config", "set", "top_k", "1")
    assert code == 6 and "cannot be written" in err


# Doctor, and start-up


def findings() -> dict[str, Finding]:
    return {one.name: one for one in examine(Context(offline=True, flags=tuple(SETTINGS)), [check_settings])}


def test_doctor_shows_the_files_and_what_is_wrong_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(user_path()) in findings()["user settings"].message
    write_user('top_k = 1\n[aliases]\na = "b"')
    write_project("model = 'x'")
    monkeypatch.setenv("MISTRAL_CLI_TOP_P", "0.9")
    found = findings()
    assert "sets top_k, 1 aliases" in found["user settings"].message
    assert "sets model" in found["project settings"].message
    assert found["MISTRAL_CLI_TOP_P"].message == "0.9 (the default of --top-p)"
    write_user("temprature = 1")
    write_project("=")
    found = findings()
    assert [found[f"{who} settings"].status for who in ("user", "project")] == ["problem", "problem"]


def test_settings_are_read_without_a_heavy_package_and_help_does_not_read_them(home: Path) -> None:
    write_user("top_k = 1")
    code = "import sys; from mistralcli.cli.app import main; main(); print(*sys.modules, file=sys.stderr)"
    loaded = {}
    for arguments in (["--help"], ["alias"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment(home), capture_output=True, text=True
        )
        loaded[arguments[0]] = set(done.stderr.split())
    assert not loaded["--help"] & {"tomllib", "tomlkit", "mistralcli.settings"}
    assert "tomllib" in loaded["alias"] and not loaded["alias"] & {"torch", "tomlkit", "huggingface_hub"}
