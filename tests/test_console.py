"""The terminal boundary: what is escaped, what is not, and where it goes."""

import os
import signal
import subprocess
import sys

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistralcli.cli.console import error_text, printable
from mistralcli.errors import MistralError

DANGEROUS = [chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))]
DECEIVING = [chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", f"import sys\nfrom mistralcli.cli import console\n{code}"]
    return subprocess.run(command, capture_output=True, check=False, timeout=60, **options)


def at_terminal(code: str, **environment: str) -> str:
    """Everything that a terminal gets from a program."""
    script = f"import sys\nfrom mistralcli.cli import console\n{code}"
    env = os.environ | {"TERM": "xterm"} | environment
    child = pexpect.spawn(sys.executable, ["-c", script], env=env, encoding="utf-8", timeout=60)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    return child.before


@pytest.mark.parametrize("character", DANGEROUS + DECEIVING)
def test_every_control_character_is_shown_as_its_number(character):
    shown = printable(f"a{character}b")
    assert shown in (f"a\\x{ord(character):02x}b", f"a\\u{ord(character):04x}b")


def test_lone_surrogates_are_shown_as_their_numbers():
    assert printable("a\ud800b\udfff") == "a\\ud800b\\udfff"


@given(st.text())
def test_printable_text_stays_as_it_is_and_a_stream_is_escaped_like_the_whole(text):
    once = printable(text)
    assert printable(once) == once
    assert "".join(map(printable, text)) == once
    assert not set(once) & set(DANGEROUS + DECEIVING)


@pytest.mark.parametrize(
    "text", ["tab\tand\nnewline", "[/INST] [bold]x[/bold]", "漢字 עברית 👩‍👩‍👧", "\u200d\u200e\xa0"]
)
def test_harmless_text_and_markup_are_untouched(text):
    assert printable(text) == text


def test_a_pipe_gets_the_raw_bytes_in_utf8_whatever_the_locale():
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = run_python("console.write_out('\\xe9\\x1b[1m\\r\\n')", env=env)
    assert result.stdout == "é\x1b[1m\r\n".encode()


def test_pieces_reach_a_pipe_in_order_with_what_was_printed_before():
    assert run_python("print('a', end=''); console.write_out('b'); print('c', end='')").stdout == b"abc"


def test_a_terminal_gets_escape_sequences_as_visible_text():
    assert at_terminal("console.write_out('\\x1b]0;owned\\x07 done')") == "\\x1b]0;owned\\x07 done"


def test_notes_and_warnings_go_to_stderr_escaped():
    result = run_python("console.note('a\\x1bb'); console.warn('c')")
    assert (result.stdout, result.stderr) == (b"", b"a\\x1bb\nwarning: c\n")


def test_a_note_without_a_stderr_is_no_error_and_no_data():
    result = run_python("sys.stderr = None\nconsole.note('nobody hears')")
    assert (result.returncode, result.stdout) == (0, b"")


def test_a_note_that_cannot_be_written_is_no_error():
    result = run_python("sys.stderr = open('/dev/full', 'w')\nconsole.note('nobody hears'); print('done')")
    assert result.stdout == b"done\n" and b"Traceback" not in result.stderr


def test_an_error_says_what_failed_and_what_to_do():
    assert error_text(MistralError("it failed")) == "error: it failed"
    assert error_text(MistralError("it failed", "try again")) == "error: it failed\nhint: try again"
    assert error_text(MistralError("no a\nb", "not a\nb")) == "error: no a\\nb\nhint: not a\\nb"


def test_input_that_is_not_utf8_is_named_with_its_place():
    result = run_python("console.read_in()", input=b"abc\xff")
    assert b"UsageError: standard input is not UTF-8 text (byte 3)" in result.stderr


PROGRESS = (
    "with console.progress('loading [bold]x', 100) as update:\n update(50)\n update(100, 100)\nprint('data')"
)


def test_progress_writes_nothing_into_a_pipe():
    result = run_python(PROGRESS, env=os.environ | {"FORCE_COLOR": "1"})
    assert (result.stdout, result.stderr) == (b"data\n", b"")


def test_progress_shows_a_bar_on_a_terminal_and_takes_no_markup():
    shown = at_terminal(PROGRESS)
    assert "loading [bold]x" in shown
    assert "100/100 bytes" in shown


def test_progress_shows_nothing_when_it_is_to_be_quiet():
    assert at_terminal(PROGRESS.replace("100)", "100, quiet=True)", 1)) == "data\r\n"


def test_ctrl_c_in_progress_is_an_exception_unless_it_is_ignored():
    code = "import signal\nwith console.progress('x'): signal.raise_signal(2)\nprint('done')"
    assert b"KeyboardInterrupt" in run_python(code).stderr
    ignored = run_python(code, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert ignored.stdout == b"done\n"


def test_progress_moves_no_cursor_on_a_dumb_terminal():
    assert at_terminal(PROGRESS, TERM="dumb") == "data\r\n"


def test_what_is_printed_beside_a_progress_bar_stays_on_stdout():
    script = (
        f"import sys\nfrom mistralcli.cli import console\n{PROGRESS.replace('update(50)', 'print(12345678)')}"
    )
    counted = f"'{sys.executable}' -c \"$0\" | wc -c"
    child = pexpect.spawn("/bin/sh", ["-c", counted, script], encoding="utf-8", timeout=60)
    child.expect(pexpect.EOF)
    assert child.before.split()[-1].endswith(str(len("12345678\ndata\n")))


def test_a_byte_order_mark_is_no_text_and_line_ends_stay():
    result = run_python("console.write_out(console.read_in())", input=b"\xef\xbb\xbfa\r\nb\n")
    assert result.stdout == b"a\r\nb\n"


def test_a_terminal_of_another_encoding_gets_what_it_can_show():
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert at_terminal("console.write_out('caf\\xe9')", **env) == "caf\\xe9"
