"""The man pages and docs/commands.md are what the help says, whole, and what a formatter takes."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY

from mistralcli import errors
from mistralcli.cli.app import COMMANDS, load_command
from mistralcli.cli.manual import commands_markdown, man_pages, write
from mistralcli.cli.manual_text import SECTIONS

AGAIN = "docs are stale; make them again with: python -m mistralcli.cli.manual docs"


def test_the_committed_pages_are_those_that_the_help_makes() -> None:
    made = man_pages()
    committed = {path.name: path.read_text() for path in (REPOSITORY / "docs" / "man").iterdir()}
    assert committed.keys() == made.keys(), AGAIN
    assert [name for name in made if committed[name] != made[name]] == [], AGAIN
    assert (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8") == commands_markdown(), AGAIN


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_of_a_command_is_missing(name: str) -> None:
    command = load_command(name)
    made, markdown = man_pages(), commands_markdown()
    for own, one in getattr(command, "commands", {"": command}).items():
        page = made[f"mistral-{name}{f'-{own}' if own else ''}.1"].replace("\\-", "-")
        section = re.split(r"\n##+ ", markdown.partition(f"# mistral {f'{name} {own}'.strip()}\n")[2])[0]
        for param in one.params:
            for flag in [flag for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")]:
                assert f"\\fB{flag}\\fP" in page and re.search(rf"`{flag}[` ]", section), flag


def test_every_exit_code_of_an_error_is_described() -> None:
    codes = {str(getattr(errors, name).exit_code) for name in errors.__all__}
    assert codes <= SECTIONS["Exit status"].keys()


def test_a_page_of_no_command_goes(tmp_path: Path) -> None:
    (tmp_path / "man").mkdir()
    (tmp_path / "man" / "mistral-gone.1").write_text(".TH")
    write(tmp_path)
    assert {path.name for path in (tmp_path / "man").iterdir()} == man_pages().keys()


def test_text_is_no_request_of_the_formatter(tmp_path: Path) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("no groff here")
    pages = [path for path in (REPOSITORY / "docs" / "man").iterdir() if path.name != "mistral-cli.1"]
    done = subprocess.run(
        [groff, "-man", "-Tutf8", "-z", "-ww", *map(str, pages)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    text = subprocess.run(
        [groff, "-man", "-Tascii", "-P-c", str(REPOSITORY / "docs" / "man" / "mistral-run.1")],
        capture_output=True,
        check=True,
    )
    shown = re.sub(rb".\x08", b"", text.stdout).decode()
    assert "--template-vars NAME=VALUE" in shown and "\\" not in shown


def test_the_pages_are_installed_where_man_looks() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["data-files"] == {"share/man/man1": ["docs/man/*.1"]}
