"""The man pages and `docs/commands.md`, made from the help of the commands: `python -m mistralcli.cli.manual docs`.

They are committed, since a wheel is built without the packages that the help is made with; a test says when they are
no longer what the help says. `pip install` puts the pages where `man` looks for those of a program in its PATH.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mistralcli import __version__
from mistralcli.cli import manual_text
from mistralcli.cli.app import COMMANDS, SUMMARY, load_command

_PLAIN = "Options"
"""The group of options that have no other, which comes first."""


@dataclass(frozen=True)
class Entry:
    """A flag or an argument: how it is written, and what it does."""

    names: tuple[str, ...]
    value: str
    help: str


@dataclass(frozen=True)
class Page:
    """A command. `options` are in groups by their titles, as the help shows them; `commands` are its own, if any."""

    name: str
    usage: str
    summary: str
    paragraphs: Sequence[str]
    arguments: Sequence[Entry]
    options: Mapping[str, Sequence[Entry]]
    commands: Sequence["Page"] = ()


def pages() -> list[Page]:
    """One for each command, in the order of the overview."""
    return [_page(name, load_command(name)) for name in COMMANDS]


def _page(name: str, command: Any) -> Page:
    params = [param for param in command.params if not getattr(param, "hidden", False)]
    arguments = [param for param in params if param.param_type_name == "argument"]
    own = getattr(command, "commands", {})
    summary, *paragraphs = (" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    options: dict[str, list[Entry]] = {_PLAIN: []}
    for param in params:
        if param not in arguments:
            options.setdefault(param.rich_help_panel or _PLAIN, []).append(_option(param))
    placeholders = [_placeholder(param) for param in arguments]
    words = [
        word if param.required else f"[{word}]" for word, param in zip(placeholders, arguments, strict=True)
    ]
    return Page(
        name,
        " ".join(["mistral", name, *(["COMMAND"] if own else []), "[OPTIONS]", *words]),
        summary,
        paragraphs,
        [Entry((word,), "", param.help or "") for word, param in zip(placeholders, arguments, strict=True)],
        {title: entries for title, entries in options.items() if entries},
        [_page(f"{name} {one}", command) for one, command in own.items()],
    )


def _option(param: Any) -> Entry:
    names = sorted(
        [*param.opts, *param.secondary_opts], key=lambda name: name.startswith("--")
    )  # short ones first
    notes = [f"default: {param.default}"] if param.default not in (None, False, "") else []
    notes += [f"variable: {param.envvar}"] if param.envvar else []
    help_text = " ".join((param.help or "").split())
    return Entry(
        tuple(names),
        "" if param.is_flag else _placeholder(param),
        f"{help_text} ({'; '.join(notes)})" if notes else help_text,
    )


def _placeholder(param: Any) -> str:
    """What stands for a value: as the help has it, else by its type or its name."""
    if param.metavar:
        return str(param.metavar).removeprefix("[").removesuffix("]")
    kind = str(
        param.display_type(typer.Context(typer.core.TyperCommand("manual")))
    )  # like "<int>", perhaps with bounds
    by_kind = {"path": "FILE", "int": "N", "float": "X"}
    return next((word for start, word in by_kind.items() if start in kind), str(param.name).upper())


def _flags(entry: Entry) -> list[tuple[str, str]]:
    return [(name, entry.value) for name in entry.names]


# ── man pages ──


def man_pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    made = pages()
    found = {"mistral.1": _overview(made), "mistral-cli.1": ".so man1/mistral.1\n"}
    for page in [*made, *(own for group in made for own in group.commands)]:
        found[f"{_man_name(page)}.1"] = "".join(_man(page))
    return found


def _man_name(page: Page) -> str:
    return f"mistral-{page.name.replace(' ', '-')}"


def _head(name: str, summary: str) -> str:
    title = f'.TH {_roff(name.upper())} 1 "" "mistral {__version__}" "User Commands"\n'
    return title + f".SH NAME\n{_roff(name)} \\- {_roff(summary.rstrip('.'))}\n"


def _overview(made: Sequence[Page]) -> str:
    """The page of the program itself."""
    parts = [_head("mistral", SUMMARY), ".SH SYNOPSIS\n", _bold("mistral"), "COMMAND [OPTIONS]\n"]
    parts += [".SH DESCRIPTION\n", *map(_paragraph, manual_text.DESCRIPTION), ".SH COMMANDS\n"]
    parts += [_item(f"{_bold_inline(_man_name(page))}(1)", COMMANDS[page.name].summary) for page in made]
    for title, entries in manual_text.SECTIONS.items():
        parts += [
            f".SH {title.upper()}\n",
            *(_item(_bold_inline(name), text) for name, text in entries.items()),
        ]
    return "".join(parts)


def _man(page: Page) -> Iterator[str]:
    yield _head(_man_name(page), page.summary)
    yield f".SH SYNOPSIS\n{_bold(f'mistral {page.name}')}"
    yield _roff(page.usage.removeprefix(f"mistral {page.name}").strip()) + "\n"
    yield ".SH DESCRIPTION\n"
    yield from map(_paragraph, (page.summary, *page.paragraphs))
    if page.commands:
        yield ".SH COMMANDS\n"
        yield from (_item(f"{_bold_inline(_man_name(own))}(1)", own.summary) for own in page.commands)
    if page.arguments:
        yield ".SH ARGUMENTS\n"
        yield from (_item(f"\\fI{_roff(one.names[0])}\\fP", one.help) for one in page.arguments)
    yield ".SH OPTIONS\n" if page.options else ""
    for title, entries in page.options.items():
        yield "" if title == _PLAIN else f".SS {_roff(title)}\n"
        yield from (_item(_man_flags(entry), entry.help) for entry in entries)
    yield f".SH SEE ALSO\n{_bold_inline('mistral')}(1), for exit codes, variables and files\n"


def _man_flags(entry: Entry) -> str:
    return ", ".join(
        _bold_inline(name) + (f" \\fI{_roff(value)}\\fP" if value else "") for name, value in _flags(entry)
    )


def _item(term: str, text: str) -> str:
    return f".TP\n{term}\n{_marked(text)}\n"


def _paragraph(text: str) -> str:
    return f".PP\n{_marked(text)}\n"


def _bold(text: str) -> str:
    return f".B {_roff(text)}\n"


def _bold_inline(text: str) -> str:
    return f"\\fB{_roff(text)}\\fP"


def _marked(text: str) -> str:
    """What is between backticks in bold."""
    parts = text.split("`")
    shown = "".join(_bold_inline(part) if i % 2 else _roff(part) for i, part in enumerate(parts))
    return f"\\&{shown}" if shown.startswith((".", "'")) else shown


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in escaped)


# ── Markdown ──


def commands_markdown() -> str:
    """`docs/commands.md`."""
    made = pages()
    parts = ["# Commands\n\n", *(f"{text}\n\n" for text in manual_text.DESCRIPTION)]
    parts += [
        "Made from the help by `python -m mistralcli.cli.manual docs`; change the help, not this file.\n\n"
    ]
    parts += [
        f"- [`mistral {page.name}`](#mistral-{page.name}): {COMMANDS[page.name].summary}\n" for page in made
    ]
    parts += [
        part for page in made for one in (page, *page.commands) for part in ("\n", *_markdown_section(one))
    ]
    for title, entries in manual_text.SECTIONS.items():
        parts += [f"\n## {title}\n\n", *(f"- `{name}`: {text}\n" for name, text in entries.items())]
    return "".join(parts)


def _markdown_section(page: Page) -> Iterator[str]:
    yield f"{'###' if ' ' in page.name else '##'} mistral {page.name}\n\n```\n{page.usage}\n```\n"
    yield from (f"\n{text}\n" for text in (page.summary, *page.paragraphs))
    if page.arguments:
        yield "\nArguments:\n\n"
        yield from (f"- `{one.names[0]}`: {one.help}\n" for one in page.arguments)
    for title, entries in page.options.items():
        yield f"\n{title}:\n\n"
        yield from (f"- {_markdown_flags(entry)}: {entry.help}\n" for entry in entries)


def _markdown_flags(entry: Entry) -> str:
    return ", ".join(f"`{f'{name} {value}'.strip()}`" for name, value in _flags(entry))


def write(docs: Path) -> None:
    """Write `commands.md` and `man/` into a directory; pages of commands that there are no more go."""
    man = docs / "man"
    man.mkdir(exist_ok=True)
    made = man_pages()
    for path in man.glob("*.1"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (man / name).write_text(text, encoding="ascii")
    (docs / "commands.md").write_text(commands_markdown(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
