"""`mistral config`: defaults of flags, where each comes from, and setting them."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.answers import warn_if_missing
from mistralcli.cli.completion import model_names, setting_keys, settings_actions
from mistralcli.cli.defaults import (
    Setting,
    checked,
    default_model,
    effective,
    known_settings,
    refuse_unknown,
    variable,
)
from mistralcli.cli.options import SETTINGS
from mistralcli.cli.tables import table
from mistralcli.errors import UsageError

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

    from mistralcli.settings import SettingsFile, Value

_HEADER = ("SETTING", "VALUE", "FROM")
_DEFAULT = "the program"


def config(
    action: Annotated[
        str | None,
        typer.Argument(
            metavar="[set|unset]",
            help="Change the user's file; without it, show all.",
            autocompletion=settings_actions,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="`model`, or the name of a flag of run and chat.",
            autocompletion=setting_keys,
        ),
    ] = None,
    value: Annotated[str | None, typer.Argument(metavar="[VALUE]", help="With set: its new default.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="MODEL", help="Defaults for this model alone.", autocompletion=model_names
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """Show the defaults of flags and where each comes from, or change one in the user's file.

    A flag counts most, then MISTRAL_CLI_NAME in the environment, then .mistral.toml in the working directory or above
    it, then the user's file.
    """
    if model == "":
        raise UsageError(
            "--for is empty", "name a model, or leave --for out: the setting is then for all models"
        )
    if action is None:
        return _show(model, as_json)
    if as_json or key is None or action not in ("set", "unset") or (value is None) == (action == "set"):
        raise UsageError(
            "that is no change of a setting",
            "mistral config set KEY VALUE, mistral config unset KEY, or mistral config to show all",
        )
    key = key.replace("-", "_")
    return _unset(key, model) if value is None else _set(key, value, model)


def _set(key: str, value: str, model: str | None) -> None:
    """Write a value that `mistral run` would accept."""
    from mistralcli.settings import edit_user_file

    written = _checked(key, value, model)

    def change(document: "TOMLDocument") -> None:
        _table(document, model)[key] = written

    path = edit_user_file(change)
    console.note(f"{key} is {written!r}{f' for {model}' if model else ''}, in {path}")
    if key == "model":
        warn_if_missing(value)


def _unset(key: str, model: str | None) -> None:
    from mistralcli.settings import edit_user_file, read_file, user_path

    path = user_path()
    file = read_file(path) if path.exists() else None
    if file is None or key not in (file.models.get(model, {}) if model else _at_the_top(file)):
        raise UsageError(
            f"{path} does not set {key}{f' for {model}' if model else ''}", "`mistral config` shows all"
        )

    def change(document: "TOMLDocument") -> None:
        del _table(document, model)[key]
        models: Any = document.get("models", {})
        if model and not models[model]:
            del models[model]
        if "models" in document and not models:
            del document["models"]

    edit_user_file(change)
    console.note(f"{key} is unset{f' for {model}' if model else ''}, in {path}")


def _at_the_top(file: "SettingsFile") -> Sequence[str]:
    """The keys that a file sets for all models."""
    return [*file.defaults, *["model"] * (file.model is not None)]


def _table(document: "TOMLDocument", model: str | None) -> Any:
    """Where values are: at the top, or in the table of one model."""
    if model is None:
        return document
    import tomlkit

    models = document.setdefault("models", tomlkit.table(is_super_table=True))
    return models.setdefault(model, tomlkit.table())


def _checked(key: str, value: str, model: str | None) -> "Value":
    """The value as a file has it.

    Raises:
        UsageError: there is no such setting, or it does not take that value.
    """
    if key == "model" and model is None:
        if not value:
            raise UsageError("the model's name is empty", "`mistral list` shows the models that are here")
        return value
    if key not in SETTINGS:
        raise UsageError(
            f"there is no setting {key!r}{' of one model' if model else ''}", known_settings(key)
        )
    parsed = checked(_flags()[key], Setting(key, value, "this command"))
    _refuse_out_of_range(key, parsed)
    return parsed if isinstance(parsed, (bool, int, float)) and key != "memory_limit" else value


def _flags() -> dict[str, Any]:
    """The flags of run by name."""
    from mistralcli.cli.app import load_command

    return {param.name: param for param in load_command("run").params}


def _refuse_out_of_range(key: str, value: Any) -> None:
    """Raise UsageError where run would, once it has begun."""
    from mistralcli.run_options import SamplingParams, SessionOptions

    for kind in (SamplingParams, SessionOptions):
        if key in kind.__dataclass_fields__:
            kind(**{key: value})


def _show(model: str | None, as_json: bool) -> None:
    settings = list(_settings(model))
    if as_json:
        console.write_out(json.dumps([vars(setting) for setting in settings], ensure_ascii=False) + "\n")
        return
    rows = [(_name(setting), _text(setting.value), setting.source) for setting in settings]
    console.write_out(table([_HEADER, *rows]))


def _settings(model: str | None) -> Iterator[Setting]:
    """All that is set for a model, or for the default one, and then what is set for single models, and aliases."""
    import os

    from mistralcli.settings import aliases, read_settings

    files = read_settings()
    from_variable = os.environ.get(variable("model"))
    default = from_variable or default_model(files)
    source = next((str(file.path) for file in files if file.model is not None), _DEFAULT)
    yield Setting("model", default or "", variable("model") if from_variable else source)
    found = effective(files, model or default)
    flags = _flags()
    for key in SETTINGS:
        own = flags[key].default
        yield found.get(key) or Setting(key, "" if own is None else own, _DEFAULT)
    if model is None:
        for file in files:
            refuse_unknown(file)
            for name, values in file.models.items():
                yield from (Setting(key, value, str(file.path), name) for key, value in values.items())
    for alias in aliases().values():
        yield Setting(f"aliases.{alias.name}", alias.model, str(alias.file.path))


def _name(setting: Setting) -> str:
    return setting.key if setting.model is None else f"{setting.key} for {setting.model}"


def _text(value: "Value") -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return " ".join(text.split()) or "-"
