"""Environment variables that change what the program does."""

import os
import re
from collections.abc import Iterator

from mistralcli import store
from mistralcli.doctor.findings import Context, Finding
from mistralcli.errors import MistralError

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
}
"""What each variable sets. Those of huggingface_hub that are not here are listed without comment."""

_OURS = "MISTRAL_CLI_"
_PREFIXES = (_OURS, "HF_", "HUGGING_FACE_", "HUGGINGFACE_")
_LOGIN = re.compile(r"(?<=//).*@")


def check_settings(context: Context) -> Iterator[Finding]:
    names = sorted(name for name, value in os.environ.items() if name.startswith(_PREFIXES) and value)
    if not names:
        yield Finding("settings", "ok", "no environment variable changes a setting")
    for name in names:
        yield _setting(name, os.environ[name])


def _setting(name: str, value: str) -> Finding:
    if name.startswith(_OURS) and name not in SETTINGS:
        known = ", ".join(one for one in SETTINGS if one.startswith(_OURS))
        return Finding(name, "note", "is set, but there is no such setting", f"those there are: {known}")
    if name == "MISTRAL_CLI_MODEL":
        try:
            store.resolve(value)
        except MistralError as error:
            return Finding(name, "problem", error.message, error.hint or f"name another model in {name}")
    meaning = SETTINGS.get(name, "read by huggingface_hub")
    return Finding(name, "ok", f"{_shown(name, value)} ({meaning})")


def _shown(name: str, value: str) -> str:
    """The value, unless it is a token; without the user and password that an address may hold."""
    if "TOKEN" in name and not name.endswith("_PATH"):
        return "set"
    return _LOGIN.sub("", value)
