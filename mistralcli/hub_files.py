"""Which files of a Hub repository make one runnable model: one copy of the weights and what belongs to it."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mistralcli.errors import IntegrityError, ModelNotFoundError
from quant.files import QUANTIZE_CONFIG, STEMS, TOKENIZER_FILES, index_name, matches, numbered_shards

_BESIDE_WEIGHTS = (*TOKENIZER_FILES, QUANTIZE_CONFIG, "quantization_card.json", "LICENSE*", "NOTICE*")
_CONFIGS = {"model": "config.json", "consolidated": "params.json"}
"""The configuration's name by the weights' stem."""

_OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX", ".bin": "pickles", ".pt": "pickles", ".pth": "pickles"}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: `digest` is the SHA-256 of its content (64 digits) or its git hash (40)."""

    name: str
    size_bytes: int
    digest: str

    def matches(self, path: Path, on_read: Callable[[int], None] = lambda n_bytes: None) -> bool:
        """Whether the file at `path` has this size and digest; `on_read` gets the bytes of each step."""
        if path.stat().st_size != self.size_bytes:
            return False
        digest = self.new_hash()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                on_read(len(chunk))
        return digest.hexdigest() == self.digest

    def new_hash(self) -> "hashlib._Hash":
        """What turns the file's content into its digest, before the first byte."""
        if len(self.digest) == 40:
            return hashlib.sha1(f"blob {self.size_bytes}\0".encode(), usedforsecurity=False)
        return hashlib.sha256()


def choose_files(repo_id: str, listing: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files to download, the configuration first and the weights last.

    Hugging Face's layout is taken where it is whole, else Mistral's own. Never two copies of the weights, and
    nothing but safetensors, JSON, tokenizers, chat templates and the licence.

    Raises:
        IntegrityError: a name would leave the directory it belongs in.
        ModelNotFoundError: there are no weights of a kind that we read; the message says what there is.
    """
    for file in listing:
        _refuse_escaping_name(repo_id, file.name)
    files = {file.name: file for file in listing}
    for stem in STEMS:
        weights, config = _weights(stem, files), _CONFIGS[stem]
        if weights and config in files:
            small = sorted(name for name in files if matches(name, _BESIDE_WEIGHTS))
            return [files[name] for name in (config, *small, *weights)]
    raise ModelNotFoundError(
        f"{repo_id} has no model that runs here: {_contents(files)}",
        "it takes config.json with model*.safetensors, or params.json with consolidated*.safetensors",
    )


def _refuse_escaping_name(repo_id: str, name: str) -> None:
    if _CONTROL.search(name) or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise IntegrityError(
            f"{repo_id} lists a file named {name!r}, which could be written outside its directory",
            "do not trust this repository, or the server in HF_ENDPOINT",
        )


def _weights(stem: str, files: dict[str, RemoteFile]) -> list[str]:
    """The names of one whole set of weights with that stem, its index first; empty when there is none."""
    if f"{stem}.safetensors" in files:
        return [f"{stem}.safetensors"]
    shards = numbered_shards(stem, files)
    needed = [index_name(stem), *shards]
    return needed if shards and all(name in files for name in needed) else []


def _contents(files: dict[str, RemoteFile]) -> str:
    """What a repository without usable weights holds, in words."""
    if not files:
        return "it is empty"
    suffixes = {PurePosixPath(name).suffix for name in files}
    formats = {text: None for suffix, text in _OTHER_FORMATS.items() if suffix in suffixes}
    if ".safetensors" in suffixes:
        formats["safetensors that are incomplete or in no known layout"] = None
    return (
        f"its weights are {' and '.join(formats)}" if formats else f"no file of its {len(files)} is weights"
    )
