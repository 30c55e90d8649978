"""`mistral --help` answers as fast as an empty Typer application, and kernels that are kept are soon there."""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.mark.slow
def test_kernels_that_are_kept_add_under_half_a_second_of_processor_time(tmp_path: Path) -> None:
    command = [*MISTRAL, "run", "-m", "demo", "--device", "cpu", "--threads", "1", "--max-tokens", "1", "Hi"]
    env = environment(tmp_path)
    without = env | {"MISTRAL_CLI_KERNELS": "reference"}
    cpu_seconds(command, env)  # which may have to compile
    added = [cpu_seconds(command, env) - cpu_seconds(command, without) for _ in range(5)]
    assert statistics.median(added) < 0.5, added
