"""What a shell may put in the place of a half-written word: names of models and settings. Files are the shell's own."""

from collections.abc import Iterator

from mistralcli.errors import MistralError

_ACTIONS = ("set", "unset")


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
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
