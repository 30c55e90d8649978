"""Completion in bash, zsh and fish, those of them that are here, under both names of the program."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from program import environment
from test_architecture import HEAVY

ENTRY = "#!{python}\nimport sys\nfrom mistralcli.__main__ import main\nsys.exit(main())\n"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A home with two builds, a pulled model, an alias and a file, and the program under its two names."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("mistral", "mistral-cli"):
        (programs / name).write_text(ENTRY.format(python=sys.executable))
        (programs / name).chmod(0o755)
    for name in ("tiny-int4", "tiny-int8", "half.partial"):
        (tmp_path / "data" / "mistral" / "models" / name).mkdir(parents=True)
    for repo_id, kind in {"owner--real": "mistral", "owner--other": "bert"}.items():
        snapshot = tmp_path / "hub" / f"models--{repo_id}" / "snapshots" / "0" / "config.json"
        snapshot.parent.mkdir(parents=True)
        snapshot.write_text(json.dumps({"model_type": kind}))
    (tmp_path / "config" / "mistral").mkdir(parents=True)
    (tmp_path / "config" / "mistral" / "config.toml").write_text('[aliases]\nsmall = "tiny-int4"\n')
    (tmp_path / "notes.txt").write_text("x")
    own = environment(tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    return own | {"PATH": f"{programs}:{own['PATH']}"}


def completed(env: dict[str, str], *words: str, shell: str = "bash", name: str = "mistral") -> list[str]:
    """What the program answers to a shell for the last of the words."""
    line = [name, *words]
    asked = {
        "bash": {"COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(words))},
        "zsh": {"_TYPER_COMPLETE_ARGS": " ".join(line)},
        "fish": {"_TYPER_COMPLETE_ARGS": " ".join(line), "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    done = subprocess.run(
        [name],
        env=env | asked | {variable: f"complete_{shell}"},
        capture_output=True,
        text=True,
        cwd=env["HOME"],
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_names_of_models_are_those_that_can_be_run(env: dict[str, str]) -> None:
    assert completed(env, "run", "-m", "") == ["tiny-int4", "tiny-int8", "owner/real", "small", "demo"]
    assert completed(env, "show", "tiny-int8") == ["tiny-int8"]
    assert completed(env, "chat", "--model=ow") == ["owner/real"]
    assert completed(env, "run", "-m", "./ti") == []  # a path, which the shell completes


def test_rm_completes_what_it_takes(env: dict[str, str]) -> None:
    assert completed(env, "rm", "") == ["half.partial", "tiny-int4", "tiny-int8", "owner/real"]


def test_commands_flags_and_settings_are_completed(env: dict[str, str]) -> None:
    assert completed(env, "t") == ["tokenize", "template"]
    assert completed(env, "eval", "") == ["ppl", "kl"]
    assert completed(env, "eval", "ppl", "--wi") == ["--window"]
    assert completed(env, "config", "set", "top") == ["top_p", "top_k"]


def test_settings_that_cannot_be_used_disturb_nobody_who_types(env: dict[str, str]) -> None:
    (Path(env["HOME"]) / "config" / "mistral" / "config.toml").write_text("no toml")
    assert completed(env, "run", "-m", "ti") == ["tiny-int4", "tiny-int8"]


def test_zsh_and_fish_get_what_they_take(env: dict[str, str]) -> None:
    assert completed(env, "run", "-m", "ti", shell="zsh") == [
        '_arguments \'*: :(("tiny-int4"',
        '"tiny-int8"))\'',
    ]
    assert completed(env, "run", "-f", "no", shell="zsh") == ["_files"]
    assert completed(env, "run", "-m", "sm", shell="fish", name="mistral-cli") == ["small"]


def test_no_name_is_offered_that_a_shell_would_evaluate(env: dict[str, str], tmp_path: Path) -> None:
    names = ["ti\\\\$(touch pwned)", "ti; touch pwned", "ti `touch pwned`", "-ti"]
    aliases = "".join(f'"{name}" = "tiny-int4"\n' for name in names)
    (tmp_path / ".mistral.toml").write_text(f"[aliases]\n{aliases}")
    assert completed(env, "run", "-m", "ti") == ["tiny-int4", "tiny-int8"]
    assert completed(env, "run", "-m", "") == ["tiny-int4", "tiny-int8", "owner/real", "small", "demo"]


def test_completion_imports_nothing_heavy(env: dict[str, str]) -> None:
    code = """if True:
        import sys, atexit
        atexit.register(lambda: print(*sys.modules, file=sys.stderr))
        sys.argv = ["mistral"]
        from mistralcli.__main__ import main
        main()"""
    asked = {"COMP_WORDS": "mistral\nrun\n-m\n", "COMP_CWORD": "3", "_MISTRAL_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", code], env=env | asked, capture_output=True, text=True)
    assert "tiny-int4" in done.stdout
    assert not set(done.stderr.split()) & set(HEAVY)


@pytest.mark.parametrize("name", ["mistral", "mistral-cli"])
@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_an_installed_completion_works_at_a_prompt(
    kind: str, name: str, env: dict[str, str], tmp_path: Path
) -> None:
    program = shutil.which(kind)
    if program is None:
        pytest.skip(f"{kind} is not installed")
    install = (
        f"{name} --install-completion; true"  # and not the shell's last command, in whose place it would run
    )
    subprocess.run([program, "-c", install], env=env, check=True, capture_output=True)
    # Typer installs fish's into ~/.config, wherever XDG_CONFIG_HOME is.
    own = env | {"PS1": "$ ", "TERM": "xterm", "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    shell = pexpect.spawn(program, ["-i"], env=own, cwd=str(tmp_path), encoding="utf-8", timeout=30)
    typed_and_shown = {
        f"{name} tok": "tokenize",
        f"{name} run -m tiny-int4 -f not": "notes.txt",
        f"{name} show ow": "owner/real",
    }
    for typed, shown in typed_and_shown.items():
        before = typed.split()[-1]
        shell.send(typed)
        shell.expect_exact(before)
        shell.send("\t")
        shell.expect_exact(shown.removeprefix(before))
        shell.send("\x15")  # clears the line
    shell.close(force=True)


@pytest.mark.parametrize("name", ["mistral", "mistral-cli"])
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_for_other_shells_name_the_program_and_its_variable(
    shell: str, name: str, env: dict[str, str]
) -> None:
    asked = env | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([name, "--show-completion", shell], env=asked, capture_output=True, text=True)
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE=complete_{shell}"
    assert done.returncode == 0 and variable in done.stdout and f" {name}" in done.stdout
