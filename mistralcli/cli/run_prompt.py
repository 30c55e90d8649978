"""What `run` reads for its flags: system prompts, tools, template variables, grammars."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistralcli.cli.answers import read_text
from mistralcli.conversation import ChatExtras
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from mistralcli.grammar import Constraint, Kind
    from mistralcli.session import Session


def read_system(system: str | None, file: Path | None) -> str | None:
    """The system prompt of --system or of --system-file; UsageError where both are given."""
    if file is None:
        return system
    if system is not None:
        raise UsageError("--system and --system-file exclude each other", "leave one of them out")
    return read_text(file).removesuffix("\n")


def read_extras(tools: Path | None, variables: Sequence[str]) -> ChatExtras:
    """What --tools and --template-vars say. Raises UsageError where they cannot be read."""
    from mistralcli.tools import parse_tools

    found = () if tools is None else parse_tools(read_text(tools), str(tools))
    return ChatExtras(found, _variables(variables))


def _variables(assignments: Sequence[str]) -> Mapping[str, Any]:
    """NAME=VALUE, the value in JSON, or a text as it is where it is no JSON."""
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"--template-vars {assignment!r} is not NAME=VALUE", "like enable_thinking=false"
            )
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


@dataclass(frozen=True)
class Grammar:
    """What answers must keep to, as it was given."""

    kind: "Kind"
    source: str

    def compile(self, session: "Session") -> "Constraint":
        """For a session's tokenizer. Raises UsageError where it is none."""
        from mistralcli.grammar import compile_constraint

        return compile_constraint(self.kind, self.source, session.tokenizer, session.stop_ids)


def read_grammar(schema: Path | None, regex: str | None, grammar: Path | None) -> Grammar | None:
    """What --schema, --regex or --grammar asks for; None without them.

    Raises:
        UsageError: two are given, or a file cannot be read.
    """
    asked: dict[Kind, str | Path | None] = {"schema": schema, "regex": regex, "grammar": grammar}
    given = [(kind, value) for kind, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError(" and ".join(f"--{kind}" for kind, _ in given) + " exclude each other", "give one")
    return next(
        (Grammar(kind, value if isinstance(value, str) else read_text(value)) for kind, value in given), None
    )
