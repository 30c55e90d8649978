"""`mistral doctor`: is this machine, and this installation, as it should be?"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mistralcli.cli import console
from mistralcli.cli.options import SETTINGS

if TYPE_CHECKING:
    from mistralcli.doctor import Finding

_STATUS_WIDTH = len("problem") + 2
_NAME_WIDTH = 27
_COLORS = {"ok": "32", "note": "33", "problem": "31"}


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of lines.")] = False,
) -> None:
    """Check this machine and this installation; exit with 1 when there is a problem, which says what to do."""
    from mistralcli.doctor import Context, examine

    findings = []
    for finding in examine(Context(offline, tuple(SETTINGS))):
        findings.append(finding)
        if not as_json:
            _write(finding)
    if as_json:
        console.write_out(json.dumps([asdict(finding) for finding in findings]) + "\n")
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def _write(finding: "Finding") -> None:
    """Status, name and message in columns; below the message what to do."""
    status = finding.status.ljust(_STATUS_WIDTH)
    line = f"{finding.name:<{_NAME_WIDTH}}{_one_line(finding.message)}\n"
    console.write_styled([(status, _COLORS[finding.status]), (line, "")], sys.stdout)
    if finding.hint:
        console.write_out(f"{'':{_STATUS_WIDTH + _NAME_WIDTH}}{_one_line(finding.hint)}\n")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
