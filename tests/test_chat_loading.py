"""The model behind the prompt: nothing heavy before it, errors of loading, another model in its place."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from conftest import REPOSITORY

from mistralcli.cli.answers import ModelChoice, choose_model
from mistralcli.cli.chat.loading import LoadedModel
from mistralcli.demo import demo_directory
from mistralcli.errors import IntegrityError, ModelNotFoundError, UsageError
from mistralcli.run_options import SessionOptions


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch) -> Path:
    """A user's directories, with a build whose last bytes are missing, and one whose tokenizer is damaged."""
    for name in ("DATA", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.delenv("MISTRAL_CLI_MODEL", raising=False)
    broken = tmp_path / "data" / "mistral" / "models" / "broken"
    shutil.copytree(demo_directory(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    mute = shutil.copytree(demo_directory(), broken.with_name("mute"))
    next(mute.glob("tokenizer.model*")).write_bytes(b"no tokenizer")
    return tmp_path


def start(model: str) -> pexpect.spawn:
    arguments = ["-m", "mistralcli", "chat", model]
    child = pexpect.spawn(
        sys.executable, arguments, cwd=str(REPOSITORY), encoding="utf-8", timeout=60, dimensions=(24, 120)
    )
    child.expect_exact(">>> ")
    return child


def ended(child: pexpect.spawn) -> int | None:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def history(homes: Path) -> str:
    return (homes / "state" / "mistral" / "history").read_text()


def demo(**options: int) -> LoadedModel:
    return LoadedModel(choose_model("demo", quiet=True), SessionOptions(**options))


def test_the_way_to_the_prompt_imports_neither_torch_nor_anything_else_that_is_heavy() -> None:
    code = (
        "import sys; import mistralcli.cli.commands.chat, mistralcli.cli.chat.terminal; "
        "from mistralcli.cli.answers import choose_model; from mistralcli.run_options import SessionOptions; "
        "from mistralcli.cli.chat.loading import LoadedModel; "
        "LoadedModel(choose_model('demo', True), SessionOptions()).introduction(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    heavy = {"torch", "numpy", "safetensors", "transformers", "tokenizers", "mistral_common", "rich.progress"}
    assert "prompt_toolkit" in done.stdout.split()
    assert not set(done.stdout.split()) & heavy


def test_the_prompt_is_there_before_the_model() -> None:
    child = start("demo")
    assert "on cpu" not in child.before
    child.expect_exact("on cpu")
    child.send("\x04")
    assert ended(child) == 0


def test_leaving_does_not_wait_for_the_model() -> None:
    child = start("demo")
    child.send("\x04")
    assert ended(child) == 0
    assert "on cpu" not in child.before


def test_a_model_that_cannot_be_loaded_ends_the_chat_and_what_was_typed_is_kept(homes) -> None:
    child = start("broken")
    child.send("typed meanwhile")
    assert ended(child) == 9
    assert len(re.findall("error: ", child.before)) == 1
    assert "Traceback" not in child.before
    assert "+typed meanwhile\n" in history(homes)


def test_a_message_to_a_model_that_cannot_be_loaded_is_kept(homes) -> None:
    child = start("broken")
    child.send("sent meanwhile\r")
    assert ended(child) == 9
    assert len(re.findall("error: ", child.before)) == 1
    assert "+sent meanwhile\n" in history(homes)


def test_a_model_that_is_not_here_is_refused_before_the_prompt() -> None:
    arguments = ["-m", "mistralcli", "chat", "nosuch"]
    output, code = pexpect.run(
        f"{sys.executable} {' '.join(arguments)}", withexitstatus=True, cwd=str(REPOSITORY)
    )
    assert code == 3
    assert b"nosuch is not on this machine" in output
    assert b">>>" not in output


def test_the_session_is_waited_for_and_told_once(capsys) -> None:
    model = demo(ctx=300)
    assert "on cpu" not in model.describe()
    session = model.session()
    assert model.ready() and not model.is_loading() and model.progress() == ""
    assert model.session() is session
    assert capsys.readouterr().err.count("demo (int4-g128) on cpu, context 300,") == 1


def test_what_loading_raised_is_raised_where_the_session_is_asked_for() -> None:
    model = demo(ctx=10**6)
    for _ in range(2):
        with pytest.raises(UsageError, match="--ctx 1000000"):
            model.session()
    assert model.failure_is_reported() and not model.ready()


def test_another_model_takes_the_place_of_the_first_one(tiny_model_dir) -> None:
    model = demo()
    first = model.session()
    model.switch(str(tiny_model_dir))
    assert model.session() is not first
    assert (model.name, model.is_first) == (str(tiny_model_dir), False)
    model.switch("demo")
    assert model.session().name == "demo"


def test_a_model_that_is_not_here_leaves_the_present_one() -> None:
    model = demo()
    session = model.session()
    with pytest.raises(ModelNotFoundError):
        model.switch("nosuch")
    assert model.session() is session and model.is_first


def test_a_model_that_is_given_up_while_it_loads_is_not_in_the_way(homes) -> None:
    model = demo()
    model.begin()
    model.switch("broken")
    with pytest.raises(IntegrityError):
        model.session()
    model.switch("demo")
    assert model.session().name == "demo"


@pytest.mark.parametrize("has_room", [True, False])
def test_a_model_that_cannot_be_loaded_leaves_the_present_one_or_has_it_loaded_again(
    has_room, monkeypatch
) -> None:
    model = demo(ctx=300)
    before = model.session()
    if not has_room:
        monkeypatch.setattr("mistralcli.device.room_bytes", lambda device, limit_bytes: 1_000_000)
    model.switch("mute")
    with pytest.raises(IntegrityError, match=r"^mute could not be loaded: ") as error:
        model.session()
    assert error.value.hint.endswith("the chat goes on with demo")
    after = model.session()
    assert (after is before) is has_room
    assert (after.name, after.max_seq_len, model.name, model.failure()) == ("demo", 300, "demo", None)


def test_under_a_memory_limit_two_models_are_never_there_at_once() -> None:
    model = demo(memory_limit=2**30)
    before = model.session()
    model.switch("mute")
    with pytest.raises(IntegrityError):
        model.session()
    assert model.session() is not before


def test_the_toolbar_says_why_a_model_could_not_take_the_place_of_another() -> None:
    model = demo()
    model.session()
    model.switch("broken")
    while model.is_loading():
        time.sleep(0.01)
    assert isinstance(model.failure(), IntegrityError) and not model.ready()
    assert model.describe().startswith("demo (int4-g128) on cpu")


def test_a_path_names_the_model_from_anywhere(tiny_model_dir, monkeypatch) -> None:
    monkeypatch.chdir(tiny_model_dir.parent)
    name = f"./{tiny_model_dir.name}"
    model = LoadedModel(ModelChoice(name, Path(name)), SessionOptions())
    assert model.name == str(tiny_model_dir)
    assert model.shown_name == name
