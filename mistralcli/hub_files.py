"""Which files of a Hub repository make one runnable model: one copy of the weights and what belongs to it."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mistralcli.errors import IntegrityError, ModelNotFoundError

_SMALL = re.compile(
    r"tekken\.json|tokenizer\.model(\.v\d+m?\d*)?|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.(json|jinja)|generation_config\.json|quantization_card\.json|LICENSE(\.\w+)?"
)
_LAYOUTS = (("config.json", "model"), ("params.json", "consolidated"))
"""The layouts of weights, in the order of preference: the configuration's name and the weights' stem."""

_OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX", ".bin": "pickles", ".pt": "pickles", ".pth": "pickles"}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: `digest` is the SHA-256 of its content (64 digits) or its git hash (40)."""

    name: str
    size_bytes: int
    digest: str

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has the size and the digest that the Hub states."""
        if path.stat().st_size != self.size_bytes:
            return False
        digest = hashlib.sha256()
        if len(self.digest) == 40:
            digest = hashlib.sha1(f"blob {self.size_bytes}\0".encode(), usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest() == self.digest


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
    for config, stem in _LAYOUTS:
        weights = _weights(stem, files)
        if weights and config in files:
            small = sorted(name for name in files if _SMALL.fullmatch(name))
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
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if single in files:
        return [single]
    shard = re.compile(rf"{stem}-\d+-of-(\d+)\.safetensors")
    found = [match for name in sorted(files) if (match := shard.fullmatch(name))]
    if index not in files or not found or len(found) != int(found[0][1]):
        return []
    return [index, *(match[0] for match in found)]


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
