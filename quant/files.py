"""Which files of a checkpoint hold its weights, and which belong to its tokenizer: by their names."""

import hashlib
import json
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import IntegrityError

if TYPE_CHECKING:
    from safetensors import safe_open

STEMS = ("model", "consolidated")
"""What names of weights begin with: Hugging Face's layout, which is preferred, and Mistral's own."""

MISTRAL_TOKENIZERS = ("tekken.json", "tokenizer.model", "*.model.v[0-9]*")
"""Mistral's own tokenizers; a SentencePiece model may have its version at the end of its name."""

TOKENIZER_FILES = (
    *MISTRAL_TOKENIZERS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""All that makes ids of text and text of ids, and says how chats are written and end."""

QUANTIZE_CONFIG = "quantize_config.json"
"""What AutoGPTQ writes beside config.json, in old repositories in place of what that states."""

_CHUNK_BYTES = 1 << 22


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a file of that name, in no folder, is one of those that the patterns mean."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def index_name(stem: str) -> str:
    """The name of the file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


def numbered_shards(stem: str, names: Collection[str]) -> list[str]:
    """All the shards of a set, there or not, of which `names` has one: `model-00002-of-00003` says that it has 3."""
    pattern = re.compile(rf"{stem}-\d+-of-(\d{{1,5}})\.safetensors")
    count = next((match[1] for name in sorted(names) if (match := pattern.fullmatch(name))), "0")
    return [f"{stem}-{number:0{len(count)}}-of-{count}.safetensors" for number in range(1, int(count) + 1)]


def weight_files(directory: Path, stem: str) -> list[str]:
    """The names of the files that hold the weights of one layout, there or not; empty when it has none.

    A single file comes before shards. Which shards there are, the index says, or else their numbers do.

    Raises:
        IntegrityError: the index cannot be read, or names what is no file of the directory.
    """
    single, index = f"{stem}.safetensors", directory / index_name(stem)
    if (directory / single).is_file():
        return [single]
    if not index.is_file():
        return numbered_shards(stem, [path.name for path in directory.glob(f"{stem}-*")])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise IntegrityError(f"{index} has no weight_map", "pull the model again")
    names = {str(name) for name in weight_map.values()}
    for name in names:
        if Path(name).name != name:
            raise IntegrityError(
                f"{index} names a shard {name!r}, which is no file name", "pull the model again"
            )
    return sorted(names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or IntegrityError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read as JSON: {error}", "pull the model again") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def open_tensors(path: Path) -> "safe_open":
    """A safetensors file, memory-mapped and its header read, or IntegrityError naming it."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(
            f"{path} is not a whole safetensors file: {error}", "the file is damaged: pull the model again"
        ) from error


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells a safetensors file from another without reading all of it: size, time, and a hash of its header.

    Raises:
        IntegrityError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, path.stat().st_size))
        status = path.stat()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error}", "pull the model again") from error
    return {
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }


def file_hash(path: Path, on_read: Callable[[int], None]) -> dict[str, Any]:
    """Size and sha256 of a file; `on_read` gets the bytes of each step."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                on_read(len(chunk))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error}", "pull the model again") from error
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}
