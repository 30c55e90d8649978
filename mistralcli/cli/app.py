"""The command table, and the one boundary where errors become a sentence and an exit code.

A command's module is imported when the command is called: `mistral --help` needs only this table.
"""

import errno
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mistralcli import __version__
from mistralcli.cli.completion import use_own_zsh_script
from mistralcli.cli.console import show_error
from mistralcli.errors import DiskError, MistralError, UsageError


@dataclass(frozen=True)
class CommandSpec:
    """Where a command lives and what the overview says of it."""

    target: str
    summary: str


COMMANDS = {
    "run": CommandSpec(
        "mistralcli.cli.commands.run:run", "Answer one prompt, from the argument, a file or a pipe."
    ),
    "chat": CommandSpec("mistralcli.cli.commands.chat:chat", "Talk with a model in the terminal."),
    "pull": CommandSpec("mistralcli.cli.commands.pull:pull", "Download a model from the Hugging Face Hub."),
    "quantize": CommandSpec("mistralcli.cli.commands.quantize:quantize", "Make a smaller build of a model."),
    "list": CommandSpec(
        "mistralcli.cli.commands.list_models:list_models", "List the models on this machine."
    ),
    "show": CommandSpec("mistralcli.cli.commands.show:show", "Show a model: its shape, files and memory."),
    "rm": CommandSpec("mistralcli.cli.commands.rm:rm", "Remove a model from this machine."),
    "du": CommandSpec("mistralcli.cli.commands.du:du", "Show what takes how much of the disk."),
    "alias": CommandSpec("mistralcli.cli.commands.alias:alias", "Give a model another name."),
    "config": CommandSpec(
        "mistralcli.cli.commands.config:config", "Show and set defaults, and where each comes from."
    ),
    "tokenize": CommandSpec(
        "mistralcli.cli.commands.tokenize:tokenize", "Show the tokens of a text as a model sees them."
    ),
    "template": CommandSpec(
        "mistralcli.cli.commands.template:template", "Show what a model really receives for a prompt."
    ),
    "bench": CommandSpec(
        "mistralcli.cli.commands.bench:bench", "Measure how fast a model runs on this machine."
    ),
    "eval": CommandSpec("mistralcli.cli.commands.eval:COMMANDS", "Measure how well a model predicts a text."),
    "verify": CommandSpec(
        "mistralcli.cli.commands.verify:verify", "Check a model's files against their hashes and its shape."
    ),
    "doctor": CommandSpec(
        "mistralcli.cli.commands.doctor:doctor", "Check this machine and this installation."
    ),
}


class LazyCommand(TyperCommand):
    """A row of the table that becomes the real command when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        command = load_command(self.name)
        is_completing = extra.get("resilient_parsing", False)
        if not is_completing and any("--model" in param.opts for param in command.params):
            from mistralcli.cli.defaults import defaults_of

            extra["default_map"] = defaults_of(command, info_name, args, parent)
        return command.make_context(info_name, args, parent, **extra)


class LazyGroup(TyperGroup):
    """The program's commands, in the table's order."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        spec = COMMANDS.get(cmd_name)
        return None if spec is None else LazyCommand(cmd_name, callback=None, help=spec.summary)


use_own_zsh_script()

app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:  # which is a shell asking for completions
        typer.echo(f"mistral {__version__}")
        raise typer.Exit


SUMMARY = "Run Mistral models on your own machine: pull, quantize, run, chat."


@app.callback(help=SUMMARY)
def mistral(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """What is said before a command."""


def load_command(name: str) -> Any:
    """The real command: its function behind the signals' boundary, with the overview's line in front of its help.

    A target that is a table of functions, by name, becomes a command with commands of its own.
    """
    spec = COMMANDS[name]
    module, _, attribute = spec.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    app = typer.Typer(
        help=spec.summary, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    for command, function in (target if isinstance(target, dict) else {name: target}).items():
        app.command(command)(_with_signals(function))
    return typer.main.get_command(app)


def _with_signals(function: Callable[..., None]) -> Callable[..., None]:
    """Make Ctrl-C and a closed pipe end the process by their signals, before Typer sees them."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _die_of(signal.SIGINT)
        except BrokenPipeError:
            _die_of(signal.SIGPIPE)

    return command


def _die_of(number: signal.Signals) -> NoReturn:
    """End as if the signal had not been caught, so that a shell sees 130 or 141 and its loops stop."""
    _drop_output()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


def _drop_output() -> None:
    """Let what is still buffered for stdout go nowhere: it cannot be written, and Python tries once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Put an empty one in the place of a standard stream that is closed, which Python sets to None.

    Raises:
        UsageError: it is standard output, without which no command is of use.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        # The lowest free descriptor is the stream's own, which no file that is opened later shall have.
        descriptor = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", encoding="utf-8"))
    if "stdout" in closed:
        raise UsageError("standard output is closed", "open it; what is not wanted can go to /dev/null")


def _program() -> str:
    """What the program was called as. Shells complete by that name, so `python -m mistralcli` goes by the usual one."""
    name = os.path.basename(sys.argv[0])  # noqa: PTH119
    return name if name in ("mistral", "mistral-cli") else "mistral"


def main() -> int:
    """Run the program and return its exit code; every known failure is one sentence on stderr, never a traceback."""
    try:
        _open_standard_streams()
        code = app(standalone_mode=False, prog_name=_program())
        sys.stdout.flush()
    except MistralError as error:
        show_error(error)
        return error.exit_code
    except typer.TyperException as error:
        if error.format_message():  # there is none with the overview, which has been printed
            show_error(MistralError(error.format_message(), "`mistral COMMAND --help` lists what it takes"))
        return getattr(error, "exit_code", 2)
    except typer.Abort:
        _die_of(signal.SIGINT)
    except BrokenPipeError:
        _die_of(signal.SIGPIPE)
    except SystemExit as error:
        if error.code == 1:  # so Typer and Rich end when nobody reads the help or the version any more
            _die_of(signal.SIGPIPE)
        raise
    except OSError as error:
        _drop_output()
        known = _from_os(error)
        show_error(known)
        return known.exit_code
    if code == 128 + signal.SIGINT:
        _die_of(signal.SIGINT)
    return code if isinstance(code, int) else 0


def _from_os(error: OSError) -> MistralError:
    """An error of the operating system that no command foresaw, as one of ours."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(f"the disk is full{where}", "free some space and run the command again")
    return MistralError(f"{error.strerror or error}{where}")
