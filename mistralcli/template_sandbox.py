"""The Jinja environment that chat templates are written for.

A chat template is a program that came with the weights. It runs in Jinja's immutable sandbox (no attribute
that leads out of it, no change to what it is given, `range` limited), by the rules of transformers' dialect,
which templates rely on: blocks are trimmed, `tojson` escapes nothing, `raise_exception` and `strftime_now`
exist, and `{% generation %}` is a mark for training that shows its content. `chat_template` limits what goes
in and what comes out; `bounded` limits the time and the memory that this takes.
"""

import json
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CPU_S = 5.0
"""The processor time that a template may take; those in circulation take milliseconds."""

MAX_MEMORY_BYTES = 2**30
"""What a template may take in addition: several times the longest text that it may write."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError or MemoryError in the block, which compiles or runs a template, when it takes too much.

    The operating system counts. The time is limited in the main thread alone, where Python handles signals.
    """
    with _bounded_memory():
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGPROF, _stop)
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"it takes more than {MAX_CPU_S:g} s")


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Where the system says how much address space the process has; elsewhere there is no limit."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class TemplateRefusalError(Exception):
    """The template called `raise_exception`: these messages do not fit its format."""


def sandbox() -> ImmutableSandboxedEnvironment:
    """A new environment. Source: transformers' documentation of writing chat templates."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return environment


class _Environment(ImmutableSandboxedEnvironment):
    """Without powers: no signal can interrupt one of huge numbers."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> NoReturn:
        raise ValueError(f"it takes a power ({operator}), which no chat template needs")


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` is what is between."""

    tags = {"generation"}  # noqa: RUF012 — declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: object) -> NoReturn:
    raise TemplateRefusalError(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 — templates may name it
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
