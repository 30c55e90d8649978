"""Python, torch, memory and disk."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mistralcli.doctor.findings import Context, Finding
from mistralcli.hub_cache import cache_directory
from mistralcli.store import models_directory
from mistralcli.units import size_text

_PULLED_7B_BYTES = 14_500_000_000
"""Mistral 7B in bfloat16, as it is pulled."""
_INT4_7B_BYTES = 4_140_000_000
"""Its int4 build: on disk, and in memory without a cache."""
_RUN_7B_BYTES = 5_000_000_000
"""That build in memory with 4,096 positions (0.54 GB in bfloat16) and a workspace."""


def check_python(context: Context) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{version} ({sys.executable})")


def check_torch(context: Context) -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001  a broken shared library raises OSError, a broken package anything
        yield Finding(
            "torch",
            "problem",
            f"torch cannot be imported: {type(error).__name__}: {error}",
            "reinstall it: pip install --force-reinstall torch",
        )
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {built}, {torch.get_num_threads()} CPU threads")


def check_memory(context: Context) -> Iterator[Finding]:
    import psutil
    import torch

    from mistralcli.device import free_memory_bytes

    free, total = free_memory_bytes(torch.device("cpu")), psutil.virtual_memory().total
    message = f"{size_text(free)} free of {size_text(total)}"
    if free >= _RUN_7B_BYTES:
        yield Finding("memory", "ok", message)
    else:
        needed = f"a 7B model in int4 needs about {size_text(_RUN_7B_BYTES)} on the CPU"
        yield Finding(
            "memory", "note", f"{message}; {needed}", "close other programs, or run a smaller model"
        )


def check_disk(context: Context) -> Iterator[Finding]:
    yield examine_directory("cache", cache_directory(), _PULLED_7B_BYTES, "a 7B model to pull", "HF_HOME")
    yield examine_directory(
        "models", models_directory(), _INT4_7B_BYTES, "an int4 build of a 7B model", "XDG_DATA_HOME"
    )


def examine_directory(name: str, directory: Path, wanted_bytes: int, what: str, variable: str) -> Finding:
    """Whether files can be written below `directory`, which need not exist yet, and whether there is room."""
    elsewhere = f"or name another directory in {variable}"
    place = next(path for path in (directory, *directory.parents) if path.exists())
    if not place.is_dir():
        return Finding(
            name, "problem", f"{directory} cannot be: {place} is a file", f"move it away, {elsewhere}"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            name, "problem", f"{place} cannot be written", f"make it yours with chown or chmod, {elsewhere}"
        )
    free = shutil.disk_usage(place).free
    message = f"{directory}: {size_text(free)} free"
    if free >= wanted_bytes:
        return Finding(name, "ok", message)
    short = f"{message}; {what} takes {size_text(wanted_bytes)}"
    return Finding(name, "note", short, f"free some space, {elsewhere}")
