"""`mistral --help` answers as fast as an empty Typer application."""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

from program import MISTRAL, environment

EMPTY_APP = '''
import typer

app = typer.Typer()


@app.command()
def nothing() -> None:
    """Do nothing."""


app()
'''
N_PAIRS = 15


def cpu_seconds(command: list[str], env: dict[str, str]) -> float:
    """Processor time of one run: on a busy machine it says more than the clock on the wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_at_most_1_15_times_an_empty_typer_application(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text(EMPTY_APP)
    commands = {"ours": [*MISTRAL, "--help"], "empty": [sys.executable, str(tmp_path / "empty.py"), "--help"]}
    env = environment(tmp_path)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 + N_PAIRS):
        for name, command in commands.items():
            seconds[name].append(cpu_seconds(command, env))
    ours, empty = (statistics.median(seconds[name][1:]) for name in commands)  # the first run warms up
    assert ours / empty < 1.15, f"{ours:.3f} s against {empty:.3f} s"
