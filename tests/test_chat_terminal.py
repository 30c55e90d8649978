"""`mistral chat` at a real pseudo-terminal, and in pipes, with a small random model and with the built-in one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mistralcli.cli.chat.completion import ChatCompleter
from mistralcli.cli.chat.history import open_history

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT_IS_UP = (
    "\x1b[?2004h"  # bracketed paste is switched on once a prompt, and off when it has been answered
)
PROMPT_IS_DONE = "\x1b[?2004l"
Start = Callable[..., pexpect.spawn]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The small model with a context so long that no answer ends before it is stopped."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny_model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    return directory


@pytest.fixture
def environment(tmp_path, model_dir) -> dict[str, str]:
    """A user's environment, with the small model as a build; this terminal answers no questions about its cursor."""
    builds = tmp_path / "data" / "mistral" / "models"
    builds.mkdir(parents=True)
    (builds / "endless").symlink_to(model_dir)
    ours = {f"XDG_{name}_HOME": str(tmp_path / name.lower()) for name in ("STATE", "DATA", "CONFIG")}
    ours |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    foreign = ("MISTRAL_CLI_MODEL", "NO_COLOR", "FORCE_COLOR")
    return {name: value for name, value in os.environ.items() if name not in foreign} | ours


@pytest.fixture
def start(environment) -> Start:
    """Start `mistral chat` at a terminal of 80 columns, greedy, and wait for its prompt and then for its model."""

    def start(*options: str, model: str = "endless", **changes: str) -> pexpect.spawn:
        command = ["-m", "mistralcli", "chat", model, "-t", "0", *options]
        child = pexpect.spawn(
            sys.executable,
            command,
            env=environment | changes,
            cwd=str(REPOSITORY),
            encoding="utf-8",
            timeout=60,
            dimensions=(24, 80),
        )
        if changes.get("TERM") == "dumb":
            child.expect_exact(">>> ")
        else:
            child.expect_exact(PROMPT_IS_UP)
            child.expect_exact("on cpu, context")
        return child

    return start


def ask(child: pexpect.spawn, keys: str) -> str:
    """Type `keys`, wait for the next prompt, and return what was shown in between, without its styling."""
    child.send(keys)
    child.expect_exact(PROMPT_IS_DONE)
    child.expect_exact(PROMPT_IS_UP)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", child.before)


def stop_answer(child: pexpect.spawn, message: str) -> None:
    """Send a message and press Ctrl-C as soon as some of the answer is there."""
    child.send(message + "\r")
    child.expect(re.escape(PROMPT_IS_DONE) + r"[^\x1b]+")
    child.send("\x03")
    child.expect_exact("(stopped)")
    child.expect_exact(PROMPT_IS_UP)


def leave(child: pexpect.spawn, keys: str) -> int:
    """Type `keys` and return how the process ended: its exit code, or minus the signal's number."""
    child.send(keys)
    return ended(child)


def ended(child: pexpect.spawn) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus if child.signalstatus is None else -child.signalstatus


def messages(child: pexpect.spawn, path: Path, role: str) -> list[str]:
    """What one side has said, as /save writes it."""
    ask(child, f"/save {path}\r")
    return [m["content"] for m in json.loads(path.read_text())["messages"] if m["role"] == role]


def test_a_second_turn_finds_the_first_in_the_cache_and_ctrl_d_leaves_with_0(start):
    child = start("-n", "8")
    child.expect_exact("32768")
    assert "(cut off at max_tokens 8)" in ask(child, "hello\r")
    n_first = int(re.search(r"prompt +(\d+) tokens", ask(child, "/stats\r"))[1])
    ask(child, "and again\r")
    n_second, n_cached = map(
        int, re.search(r"prompt +(\d+) tokens, (\d+) of them", ask(child, "/stats\r")).groups()
    )
    assert n_first <= n_cached < n_second
    assert leave(child, "\x04") == 0


def test_the_built_in_model_tells_a_story_and_goes_on_with_it(start, tmp_path):
    child = start(model="demo")
    assert "fox" in ask(child, "Tell me a story about a fox.\r")
    ask(child, "What happened next?\r")
    story, sequel = messages(child, tmp_path / "chat.json", "assistant")
    hero = re.search(r"(?:named|called) ([A-Z]\w+)", story)[1]
    assert hero in sequel and sequel != story
    assert leave(child, "\x04") == 0


def test_ctrl_c_stops_the_answer_and_keeps_it(start, tmp_path):
    child = start()
    stop_answer(child, "hello")
    stop_answer(child, "go on")
    assert all(messages(child, tmp_path / "chat.json", "assistant"))
    assert messages(child, tmp_path / "chat.json", "user") == ["hello", "go on"]
    assert leave(child, "/exit\r") == 0


def test_ctrl_c_clears_the_line_and_pressed_twice_ends_by_the_signal(start, tmp_path):
    child = start("-n", "1")
    assert "Ctrl-C again" in ask(child, "never sent\x03")
    ask(child, "sent\r")
    assert messages(child, tmp_path / "chat.json", "user") == ["sent"]
    assert "Ctrl-C again" in ask(child, "cleared\x03")
    assert "Ctrl-C again" in ask(child, "cleared too\x03")
    assert leave(child, "\x03") == -signal.SIGINT


def test_a_message_can_have_many_lines_and_any_bytes(start, tmp_path):
    child = start("-n", "1")
    ask(child, '"""one\r/two\r"""\r')
    ask(child, "alt\x1b\renter\r")
    ask(child, "\x1b[200~pasted\rlines\nthree\x1b[201~\r")
    ask(child, "//slash\r")
    os.write(child.child_fd, b"bytes \xff\xc3")
    ask(child, "\r")
    assert messages(child, tmp_path / "chat.json", "user") == [
        "one\n/two",
        "alt\nenter",
        "pasted\nlines\nthree",
        "/slash",
        "bytes ??",
    ]


def test_tab_completes_a_command(start):
    assert "context " in ask(start(), "/sta\t\r")


def test_what_was_typed_is_in_the_history_of_the_next_session_and_nobody_elses(start, tmp_path):
    child = start("-n", "1")
    ask(child, "remember me\r")
    leave(child, "\x04")
    child = start("-n", "1")
    ask(child, "\x1b[A\r")
    assert messages(child, tmp_path / "chat.json", "user") == ["remember me"]
    history = tmp_path / "state" / "mistral" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.parent.stat().st_mode & 0o777 == 0o700


def test_a_message_that_does_not_fit_is_back_at_the_prompt(start, tmp_path):
    child = start("--ctx", "40", "-n", "1")
    assert "the context has 40 tokens" in ask(child, f"short{' and long' * 60}\r")
    ask(child, "\x01\x1b[C\x1b[C\x1b[C\x1b[C\x1b[C\x0b\r")  # to the start, five to the right, cut the rest
    assert messages(child, tmp_path / "chat.json", "user") == ["short"]


@pytest.mark.parametrize(
    ("number", "busy"), [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGHUP, False)]
)
def test_a_signal_leaves_the_terminal_as_it_was(start, number, busy):
    child = start()
    at_prompt = termios.tcgetattr(child.child_fd)
    if busy:
        child.send("hello\r")
        child.expect(re.escape(PROMPT_IS_DONE) + r"[^\x1b]+")
    child.kill(number)
    child.expect(pexpect.EOF)
    assert "Traceback" not in child.before
    modes = termios.tcgetattr(child.child_fd)[3]
    assert (modes & termios.ECHO, modes & termios.ICANON) == (termios.ECHO, termios.ICANON)
    assert not at_prompt[3] & termios.ECHO
    assert ended(child) == 128 + number


def test_a_chat_ends_when_its_terminal_is_closed(start):
    child = start()
    child.ptyproc.fileobj.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 128 + signal.SIGHUP


def test_a_terminal_that_goes_without_a_signal_ends_the_chat_and_keeps_what_was_typed(environment, tmp_path):
    command = f"trap '' HUP; exec '{sys.executable}' -m mistralcli chat demo 2> '{tmp_path}/errors'"
    child = pexpect.spawn(
        "/bin/sh", ["-c", command], env=environment, cwd=str(REPOSITORY), encoding="utf-8", timeout=60
    )
    child.expect_exact("on cpu")
    child.send("not sent yet")
    child.expect_exact("not sent yet")
    child.ptyproc.fileobj.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 128 + signal.SIGHUP
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert "+not sent yet\n" in (tmp_path / "state" / "mistral" / "history").read_text()


def test_what_is_typed_while_an_answer_comes_is_not_mixed_into_it_and_is_at_the_next_prompt(start, tmp_path):
    child = start()
    child.send("hello\r")
    child.expect(re.escape(PROMPT_IS_DONE) + r"[^\x1b]+")
    child.send("typed ahead")
    child.send("\x03")
    child.expect_exact(PROMPT_IS_UP)
    assert "typed" not in child.before
    child.expect_exact("typed ahead")
    stop_answer(child, "")
    assert messages(child, tmp_path / "chat.json", "user") == ["hello", "typed ahead"]


def test_ctrl_r_finds_what_was_typed(start, tmp_path):
    child = start("-n", "1")
    ask(child, "find me again\r")
    ask(child, "something else\r")
    ask(child, "\x12find\r\r")
    assert messages(child, tmp_path / "chat.json", "user")[-1] == "find me again"


def test_continue_goes_on_with_the_last_chat_and_its_settings(start, tmp_path):
    child = start("-n", "1")
    ask(child, "the first question\r")
    leave(child, "\x04")
    child = start("--continue")
    ask(child, "the second\r")
    assert "(cut off at max_tokens 1)" in child.before
    assert messages(child, tmp_path / "chat.json", "user") == ["the first question", "the second"]


def test_a_dumb_terminal_gets_no_escape_sequences(start):
    child = start("-n", "1", TERM="dumb")
    shown = child.before
    child.send("hello\r")
    child.expect_exact("(cut off")
    shown += child.before
    child.expect_exact(">>> ")
    assert leave(child, "\x04") == 0
    assert "\x1b" not in shown + child.before


def test_no_color_is_respected(start):
    child = start("-n", "1", NO_COLOR="1")
    shown = child.before
    child.send("hello\r")
    child.expect_exact("(cut off")
    shown += child.before
    styles = re.findall(r"\x1b\[([0-9;]*)m", shown)
    assert styles
    assert not [style for style in styles if re.search(r"(^|;)(3|4|9|10)\d", style)]


def test_answers_go_into_a_file_alone_while_the_user_types_at_a_terminal(model_dir, environment, tmp_path):
    command = f"exec '{sys.executable}' -m mistralcli chat '{model_dir}' -t 0 -n 3 > '{tmp_path}/answers'"
    child = pexpect.spawn(
        "/bin/sh", ["-c", command], env=environment, cwd=str(REPOSITORY), encoding="utf-8", timeout=60
    )
    child.expect_exact(PROMPT_IS_UP)
    ask(child, "hello\r")
    assert leave(child, "\x04") == 0
    answers = (tmp_path / "answers").read_bytes()
    assert answers.decode("utf-8").endswith("\n")
    assert b"\x1b" not in answers
    assert b"cut off" not in answers


def piped(environment, data: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mistralcli", "chat", *options]
    return subprocess.run(
        command, input=data, capture_output=True, env=environment, cwd=REPOSITORY, timeout=60
    )


def test_in_a_pipe_all_input_is_one_message_and_only_the_answer_comes_out(model_dir, environment):
    model = ("-m", str(model_dir), "-t", "0", "-n", "5")
    piped_out = piped(environment, b"/help\nis no command here\n", *model)
    run = [sys.executable, "-m", "mistralcli", "run", "-q", "/help\nis no command here", *model]
    once = subprocess.run(run, stdin=subprocess.DEVNULL, capture_output=True, env=environment, cwd=REPOSITORY)
    assert piped_out.returncode == 0
    assert piped_out.stdout == once.stdout != b""
    assert b"\x1b" not in piped_out.stdout + piped_out.stderr
    assert b"on cpu" in piped_out.stderr


def test_in_a_pipe_continue_goes_on_with_the_last_message_too(environment, tmp_path):
    first = piped(environment, b"What is 2 + 2?", "demo", "-t", "0", "-n", "5")
    assert first.returncode == 0
    second = piped(environment, b"And again?", "-c")
    assert second.returncode == 0
    assert b"demo" in second.stderr
    (path,) = (tmp_path / "data" / "mistral" / "sessions").glob("*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    said = [(event["role"], event["content"]) for event in events if event["event"] == "message"]
    assert said[:2] == [("user", "What is 2 + 2?"), ("assistant", first.stdout.decode())]
    assert said[2:] == [("user", "And again?"), ("assistant", second.stdout.decode())]


def test_continue_without_a_chat_before_says_so_and_begins_one(environment):
    done = piped(environment, b"Hello", "-c", "-m", "demo", "-n", "3")
    assert done.returncode == 0
    assert b"no chat to go on with" in done.stderr


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (b"", ("MODEL",), b"no prompt"),
        (b"\xff", ("MODEL",), b"not UTF-8"),
        (b"hi", ("MODEL", "-m", "other"), b"two models"),
        (b"hi", ("MODEL", "--temperature", "-1"), b"temperature"),
        (b"hi", ("MODEL", "-n", "0"), b"max_tokens is 0"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(model_dir, environment, data, options, reason):
    options = tuple(str(model_dir) if option == "MODEL" else option for option in options)
    result = piped(environment, data, *options)
    assert result.returncode == 2
    assert reason in result.stderr
    assert result.stdout == b""


def test_a_reader_that_goes_away_ends_the_answer_by_sigpipe(model_dir, environment):
    command = [sys.executable, "-m", "mistralcli", "chat", str(model_dir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd=REPOSITORY
    ) as process:
        process.stdin.write(b"hello")
        process.stdin.close()
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == -signal.SIGPIPE
        assert b"Traceback" not in process.stderr.read()


def completions(text):
    return [c.text for c in ChatCompleter().get_completions(Document(text), CompleteEvent())]


def test_commands_settings_and_files_are_completed(tmp_path, monkeypatch):
    (tmp_path / "trip.json").touch()
    monkeypatch.chdir(tmp_path)
    assert completions("/s") == ["/system ", "/set ", "/save ", "/sessions ", "/stats "]
    assert completions("/set t") == ["temperature ", "top_p ", "top_k "]
    assert completions("/load tr") == ["ip.json"]
    assert completions("hel") == completions("/system x") == completions("/nothing ") == []


def test_history_is_for_its_owner_alone_also_when_the_file_was_not(tmp_path):
    path = tmp_path / "state" / "history"
    open_history(path).append_string("a secret")
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    path.chmod(0o644)
    assert list(open_history(path).load_history_strings()) == ["a secret"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_chat_without_a_place_for_its_history_says_so_and_goes_on(tmp_path, capsys):
    (tmp_path / "file").touch()
    history = open_history(tmp_path / "file" / "history")
    history.append_string("kept in memory")
    assert history.get_strings() == ["kept in memory"]
    assert "no history is kept" in capsys.readouterr().err


def test_a_full_disk_does_not_end_a_chat(tmp_path):
    history = open_history(tmp_path / "history")
    history.filename = "/dev/full"
    history.append_string("said anyway")
    assert history.get_strings() == ["said anyway"]
