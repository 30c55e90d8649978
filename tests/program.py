"""Run the program as a user does: in a process of its own, with its own home."""

import os
import subprocess
import sys
from pathlib import Path

RESIDENT = """
def resident_bytes(entry="VmRSS"):
    # VmHWM is the peak. getrusage's would count what the parent had before it started this program.
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(entry))) * 1024
"""
"""For programs that measure their own memory; goes in front of them."""

MISTRAL = [sys.executable, "-m", "mistralcli"]


def environment(home: Path, **changes: str) -> dict[str, str]:
    """The environment of a user whose home is `home`, offline, without this machine's settings."""
    ours = ("HF_", "HUGGING_FACE_", "MISTRAL_", "XDG_")
    dropped = ("NO_COLOR", "FORCE_COLOR")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and name not in dropped and not name.lower().endswith("_proxy")
    }
    own = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "TERM": "xterm-256color"}
    own |= {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("DATA", "CONFIG", "STATE", "CACHE")}
    return kept | own | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)} | changes


def mistral(
    *arguments: str | Path, home: Path, stdin: str | bytes = b"", timeout_s: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run one command with piped streams; stdout and stderr are decoded, newlines untouched."""
    done = subprocess.run(
        [*MISTRAL, *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env=environment(home, **env),
        timeout=timeout_s,
        cwd=home,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_one_sentence(done: subprocess.CompletedProcess[str], exit_code: int, *parts: str) -> None:
    """The command failed as it should: exit code, an error line that names the facts, no traceback, no data."""
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
