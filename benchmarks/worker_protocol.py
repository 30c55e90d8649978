"""How a benchmark talks to an engine in another process: a JSON object a line, one answer to each request.

Between two requests a worker waits for its input, so that of several engines one computes at a time. This file needs
nothing but Python: workers run in environments of their own.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SETTLE_S = 0.1
"""After an answer, for threads of its engine that still spin."""


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer the requests on standard input until it ends; what else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        result = handlers[request.pop("do")](**request)
        print(json.dumps(result), file=answers, flush=True)


def memory() -> dict[str, int]:
    """Resident bytes of this process: the most there were, and those now that are mapped files and that are not."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in status)}
    names = {"peak": "VmHWM", "file": "RssFile", "anonymous": "RssAnon"}
    return {ours: int(fields[theirs].split()[0]) << 10 for ours, theirs in names.items()}


def timed(ids: Iterable[int]) -> dict[str, list[Any]]:
    """The ids that come, and the seconds from now to each of them."""
    started, seconds, found = time.perf_counter(), [], []
    for one in ids:
        seconds.append(time.perf_counter() - started)
        found.append(one)
    return {"ids": found, "seconds": seconds}


def worker_command(engine: str, python: str = sys.executable) -> list[str]:
    """What starts the process of `worker_<engine>.py`."""
    return [python, str(Path(__file__).parent / f"worker_{engine}.py")]


class Worker:
    """An engine in a process of its own, which answers what `serve` has handlers for."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to a request.

        Raises:
            SystemExit: the worker ended instead; the message has the last it said.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has ended: no answer comes
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
            raise SystemExit(f"the worker ended when asked to {do}; the last it said:\n{said[-2000:]}")
        time.sleep(SETTLE_S)
        return json.loads(answer)

    @property
    def processor_s(self) -> float:
        """Seconds of processor time that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()


class Load:
    """What others than a worker take of the processors from now on."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._before = self._now()

    def others_share(self) -> float:
        """Their share until now."""
        busy, all_of_it, own = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - own) / all_of_it if all_of_it else 0.0

    def _now(self) -> tuple[float, float, float]:
        """Seconds of all processors that were busy, that there were, and that the worker has used."""
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = seconds[3] + seconds[4]
        return sum(seconds) - idle, sum(seconds), self._worker.processor_s
