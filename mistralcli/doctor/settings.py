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
    "TRANSFORMERS_OFFLINE": "as HF_HUB_OFFLINE, where that is not set",
    "XDG_DATA_HOME": "builds are below it",
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
    names = sorted(name for name in os.environ if _is_setting(name))
    if not names:
        yield Finding("settings", "ok", "no environment variable changes a setting")
    for name in names:
        yield _setting(name, os.environ[name])


def _is_setting(name: str) -> bool:
    """Whether a variable changes something; empty, only one does: it hides all devices."""
    if not os.environ[name]:
        return name == "CUDA_VISIBLE_DEVICES"
    return name in SETTINGS or name.lower() in _PROXIES or name.startswith(_PREFIXES)


def _setting(name: str, value: str) -> Finding:
    if name.startswith(_OURS) and name not in SETTINGS:
        known = ", ".join(one for one in SETTINGS if one.startswith(_OURS))
        return Finding(name, "note", "is set, but there is no such setting", f"those there are: {known}")
    if name == "MISTRAL_CLI_MODEL":
        try:
            store.resolve(value)
        except MistralError as error:
            return Finding(name, "problem", error.message, error.hint or f"name another model in {name}")
    if name == "MISTRAL_CLI_KERNELS" and value != "reference":
        message = f"{value} has no effect: only `reference` has, which turns all kernels off"
        return Finding(name, "note", message, f"unset {name}")
    meaning = SETTINGS.get(name) or _PROXIES.get(name.lower(), "read by huggingface_hub")
    return Finding(name, "ok", f"{_shown(name, value)} ({meaning})")


def _shown(name: str, value: str) -> str:
    """The value, unless it is a token; without the user and password that an address may hold."""
    if "TOKEN" in name and not name.endswith("_PATH"):
        return "set"
    value = _LOGIN.sub("", value)
    if name.lower() in _PROXIES:  # whose address may lack the http://
        return value.rpartition("@")[2]
    return value or "empty"
