"""What a shell may put in the place of a half-written word: names of models and settings. Files are the shell's own."""

import re
from collections.abc import Iterator
from contextlib import suppress

from mistralcli.errors import MistralError

_ZSH_SCRIPT = """
#compdef -p %(prog_name)s

%(complete_func)s() {
  _compskip=all
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" %(autocomplete_var)s=complete_zsh %(prog_name)s)
}

if [[ $funcstack[1] == _%(prog_name)s ]]; then
  %(complete_func)s
else
  compdef -p %(complete_func)s %(prog_name)s
fi
"""
"""In the place of Typer's, which completes nothing at the first Tab, and for `mistral` never: zsh has a completion of
OpenStack's client of that name, and only a pattern (-p) comes before it."""

_ACTIONS = ("set", "unset")
_NAME = re.compile(r"\w[\w./@+-]*")
"""What is offered as a name. A shell evaluates what it is given, and a project's aliases may be called anything."""


def use_own_zsh_script() -> None:
    """Have `--install-completion` write our script for zsh. A Typer that keeps its scripts elsewhere writes its own."""
    with suppress(ImportError, AttributeError):
        from typer import _completion_shared

        _completion_shared._completion_scripts["zsh"] = _ZSH_SCRIPT


def model_names(incomplete: str) -> list[str]:
    """What can be run and begins so: builds, pulled models, aliases, the demo.

    None for what is written as a path, which the shell completes. Where settings cannot be used, there are no aliases:
    the command itself will say why.
    """
    from mistralcli import inventory, store
    from mistralcli.demo import DEMO

    if store.is_path(incomplete) and not incomplete[:1].isalnum():
        return []
    whole = (name for name in inventory.names() if not name.endswith(store.PARTIAL))
    return _beginning(incomplete, [*whole, *_aliases(), DEMO])


def stored_names(incomplete: str) -> list[str]:
    """What `mistral rm` takes and begins so, the half-made too."""
    from mistralcli import inventory

    return _beginning(incomplete, inventory.names())


def settings_actions(incomplete: str) -> list[str]:
    """What `mistral config` does."""
    return _beginning(incomplete, _ACTIONS)


def setting_keys(incomplete: str) -> list[str]:
    """What `mistral config set` takes."""
    from mistralcli.cli.options import SETTINGS

    return _beginning(incomplete.replace("-", "_"), ["model", *SETTINGS])


def _aliases() -> Iterator[str]:
    from mistralcli.settings import aliases

    try:
        yield from aliases()
    except MistralError:
        return


def _beginning(incomplete: str, names: "list[str] | tuple[str, ...]") -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete) and _NAME.fullmatch(name)]
