"""How long after Enter the built-in demo's first token appears, beside torch's own import.

    python benchmarks/first_token.py            ten interleaved pairs after one that warms up

Prints the medians in seconds and their difference, which is what `mistral` itself takes.
"""

import statistics
import subprocess
import sys
import time

PAIRS = 10
IMPORT = [sys.executable, "-c", "import torch; print('done')"]
RUN = [sys.executable, "-m", "mistralcli", "run", "-q", "-n", "8", "Tell me a story about a fox."]


def seconds_to_first_byte(command: list[str]) -> float:
    """From starting the process to the first byte on its stdout; the rest of its output is read as well."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    assert first and process.returncode == 0, f"{command} failed"
    return seconds


def main() -> None:
    taken: dict[str, list[float]] = {"import torch": [], "first token": []}
    for _ in range(1 + PAIRS):
        for name, command in zip(taken, (IMPORT, RUN), strict=True):
            taken[name].append(seconds_to_first_byte(command))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.2f} s")
    print(f"difference: {medians['first token'] - medians['import torch']:.2f} s")


if __name__ == "__main__":
    main()
