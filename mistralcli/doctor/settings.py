"""Environment variables and settings files that change what the program does."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mistralcli import store
from mistralcli.doctor.findings import Context, Finding, guarded
from mistralcli.errors import MistralError
from mistralcli.settings import is_own, nearest_project_file, read_file, user_path

SETTINGS = {
    "MISTRAL_CLI_MODEL": "the model when none is named",
    "MISTRAL_CLI_KERNELS": "`reference` turns all kernels off",
    "HF_HOME": "where Hugging Face's tools keep their files",
    "HF_HUB_CACHE": "where pulled models are",
    "HUGGINGFACE_HUB_CACHE": "where pulled models are",
    "HF_ENDPOINT": "the Hub's address",
    "HF_HUB_OFFLINE": "1 forbids asking the Hub",
    "HF_TOKEN": "the token that is sent to the Hub",
    "HUGGING_FACE_HUB_TOKEN": "the token that is sent to the Hub",
    "HF_TOKEN_PATH": "the file that holds the token",
    "TRANSFORMERS_OFFLINE": "as HF_HUB_OFFLINE, where that is not set",
    "XDG_DATA_HOME": "builds are below it",
    "XDG_CONFIG_HOME": "the settings file is below it",
    "XDG_STATE_HOME": "the history of chats is below it",
    "XDG_CACHE_HOME": "pulled models are below it, unless HF_HOME says where",
    "CUDA_VISIBLE_DEVICES": "the NVIDIA devices that can be used",
    "OMP_NUM_THREADS": "the CPU threads of torch",
    "SSL_CERT_FILE": "the authorities whose certificates are trusted",
}
"""What each variable sets. Those of huggingface_hub that are not here are listed without comment."""

_OURS = "MISTRAL_CLI_"
_PREFIXES = (_OURS, "HF_", "HUGGING_FACE_", "HUGGINGFACE_")
_PROXIES = {
    "http_proxy": "the proxy on the way to the Hub",
    "https_proxy": "the proxy on the way to the Hub",
    "all_proxy": "the proxy on the way to the Hub",
    "no_proxy": "what is asked without a proxy",
}
"""In small letters; capitals are read as well."""

_LOGIN = re.compile(r"(?<=//).*@")


def check_settings(context: Context) -> Iterator[Finding]:
    yield from _check_files(context.flags)
    names = sorted(name for name in os.environ if _is_setting(name))
    if not names:
        yield Finding("settings", "ok", "no environment variable changes a setting")
    for name in names:
        yield _setting(name, os.environ[name], context.flags)


def _check_files(flags: Sequence[str]) -> Iterator[Finding]:
    """The project's file and the user's: there or not, and whether they can be used."""
    nearest, user = nearest_project_file(), user_path()
    if nearest is not None and not is_own(nearest):
        message = f"{nearest} belongs to another user, and is ignored"
        yield Finding("project settings", "note", message, f"to use it: chown {os.getuid()} {nearest}")
    elif nearest is not None:
        yield from guarded("project settings", lambda: _file(nearest, flags, is_project=True))
    if user.is_file():
        yield from guarded("user settings", lambda: _file(user, flags, is_project=False))
    else:
        yield Finding("user settings", "ok", f"none at {user}")


def _file(path: Path, flags: Sequence[str], *, is_project: bool) -> Iterator[Finding]:
    name = "project settings" if is_project else "user settings"
    file = read_file(path, is_project=is_project)
    unknown = [key for table in (file.defaults, *file.models.values()) for key in table if key not in flags]
    if unknown:
        yield Finding(
            name, "problem", f"{path} sets {unknown[0]!r}, which is no setting", "`mistral config` lists them"
        )
        return
    keys = [*["model"] * (file.model is not None), *file.defaults]
    counts = {"aliases": len(file.aliases), "models with defaults of their own": len(file.models)}
    parts = [*keys, *(f"{count} {what}" for what, count in counts.items() if count)]
    yield Finding(name, "ok", f"{path} sets {', '.join(parts) or 'nothing'}")


def _is_setting(name: str) -> bool:
    """Whether a variable changes something; empty, only one does: it hides all devices."""
    if not os.environ[name]:
        return name == "CUDA_VISIBLE_DEVICES"
    return name in SETTINGS or name.lower() in _PROXIES or name.startswith(_PREFIXES)


def _setting(name: str, value: str, flags: Sequence[str]) -> Finding:
    defaults = {_OURS + flag.upper(): f"the default of --{flag.replace('_', '-')}" for flag in flags}
    if name.startswith(_OURS) and name not in SETTINGS | defaults:
        known = ", ".join(one for one in SETTINGS | defaults if one.startswith(_OURS))
        return Finding(name, "note", "is set, but there is no such setting", f"those there are: {known}")
    if name == "MISTRAL_CLI_MODEL":
        try:
            store.resolve(value)
        except MistralError as error:
            return Finding(name, "problem", error.message, error.hint or f"name another model in {name}")
    if name == "MISTRAL_CLI_KERNELS" and value != "reference":
        message = f"{value} has no effect: only `reference` has, which turns all kernels off"
        return Finding(name, "note", message, f"unset {name}")
    meaning = (
        SETTINGS.get(name) or defaults.get(name) or _PROXIES.get(name.lower(), "read by huggingface_hub")
    )
    return Finding(name, "ok", f"{_shown(name, value)} ({meaning})")


def _shown(name: str, value: str) -> str:
    """The value, unless it is a token; without the user and password that an address may hold."""
    if "TOKEN" in name and not name.endswith("_PATH"):
        return "set"
    value = _LOGIN.sub("", value)
    if name.lower() in _PROXIES:  # whose address may lack the http://
        return value.rpartition("@")[2]
    return value or "empty"
