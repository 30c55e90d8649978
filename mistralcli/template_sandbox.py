"""The Jinja environment that chat templates are written for.

A chat template is a program that came with the weights. It runs in Jinja's immutable sandbox (no attribute
that leads out of it, no change to what it is given, `range` limited), by the rules of transformers' dialect,
which templates rely on: blocks are trimmed, `tojson` escapes nothing, `raise_exception` and `strftime_now`
exist, and `{% generation %}` is a mark for training that shows its content. `chat_template` limits what goes
in and what comes out; the time and memory of what a template does without writing are not limited.
"""

import json
from datetime import datetime
from typing import NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateRefusalError(Exception):
    """The template called `raise_exception`: these messages do not fit its format."""


def sandbox() -> ImmutableSandboxedEnvironment:
    """A new environment. Source: transformers' documentation of writing chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return environment


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
