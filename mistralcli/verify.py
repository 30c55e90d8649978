"""Whether a model's files are what they should be: hashes, names and shapes, finite values, and what its card says.

Hashes are those that a build's card has of its files, or those after which the Hub's cache names what it keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mistralcli.checkpoint_files import Checkpoint
from mistralcli.config import read_config, read_json
from mistralcli.errors import IntegrityError
from mistralcli.hub_cache import blob_digest
from mistralcli.hub_files import RemoteFile
from mistralcli.weights import OnProgress, open_checkpoint
from quant.files import TOKENIZER_FILES, matches
from quant.progress import Progress
from quant.scheme import schemes_of
from quant.staging import CARD

_TILE_VALUES = 1 << 22
_CODES = (torch.uint8, torch.int8, torch.int32)
_RUN_WITH = (*TOKENIZER_FILES, "config.json", "params.json", "*.safetensors", "*.safetensors.index.json")
"""Files that change what a model does: a build has none that its card does not know."""


@dataclass(frozen=True)
class Verification:
    """What was looked at and found. `problems` are sentences that name a file or a tensor; without any, all is well.

    `n_hashed` files were compared with hashes that the "card" or the "hub" has of them, as `hashes_of` says; None
    where nobody has.
    """

    hashes_of: str | None
    n_hashed: int
    n_tensors: int
    size_bytes: int
    problems: Sequence[str]


def verify(directory: Path, on_progress: OnProgress | None = None) -> Verification:
    """Read all of a model's files and compare them with what is known of them.

    Raises:
        MistralError: the model is of a kind that is not supported, or cannot be read at all.
    """
    card = read_json(directory / CARD) if (directory / CARD).is_file() else None
    problems: list[str] = []
    try:
        hashes_of, recorded = _recorded(directory, card)
    except IntegrityError as error:
        hashes_of, recorded = None, []
        problems.append(error.message)
    present = [path for path in directory.iterdir() if path.is_file()]
    weights = [path for path in present if path.suffix == ".safetensors"]
    named = [directory / file.name for file in recorded if (directory / file.name).is_file()]
    progress = Progress(on_progress, sum(path.stat().st_size for path in (*weights, *named)))
    problems += [problem for file in recorded for problem in _file_problems(directory, file, progress)]
    if hashes_of == "card":
        known = {CARD, *(file.name for file in recorded)}
        extra = sorted(
            path.name for path in present if matches(path.name, _RUN_WITH) and path.name not in known
        )
        problems += [f"{name} is not of the build: its card does not know it" for name in extra]
    n_tensors = 0
    try:
        checkpoint = open_checkpoint(directory)
        n_tensors = len(checkpoint.names())
        problems += _not_finite(checkpoint, progress)
        problems += [] if card is None else _card_problems(checkpoint, directory, card)
    except IntegrityError as error:
        problems.append(error.message)
    size = sum(path.stat().st_size for path in present)
    return Verification(hashes_of, len(recorded), n_tensors, size, problems)


def _recorded(directory: Path, card: Mapping[str, Any] | None) -> tuple[str | None, list[RemoteFile]]:
    """Who has hashes of the files in `directory`, and the hashes."""
    digests = {path.name: blob_digest(path) for path in sorted(directory.iterdir())}
    linked = {name: digest for name, digest in digests.items() if digest is not None}
    if linked:
        return "hub", [_as_it_is(directory / name, digest) for name, digest in linked.items()]
    if card is None or "files" not in card:
        return None, []
    try:
        files = [
            RemoteFile(str(name), int(file["size_bytes"]), str(file["sha256"]))
            for name, file in card["files"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(
            f"{directory / CARD} has hashes of files in a form that is not known: {error}"
        ) from error
    for file in files:
        if Path(file.name).name != file.name:
            raise IntegrityError(f"{directory / CARD} names {file.name!r}, which is no file of a build")
    return "card", files


def _as_it_is(path: Path, digest: str) -> RemoteFile:
    """A file of which only the digest is known, which shows a wrong size too."""
    return RemoteFile(path.name, path.stat().st_size if path.is_file() else 0, digest)


def _file_problems(directory: Path, file: RemoteFile, progress: Progress) -> Iterator[str]:
    path = directory / file.name
    if not path.is_file():
        yield f"{file.name} is missing"
    elif path.stat().st_size != file.size_bytes:
        yield f"{file.name} has {path.stat().st_size:,} bytes instead of {file.size_bytes:,}"
    elif not file.matches(path, progress.advance):
        yield f"{file.name} is damaged: its hash is not {file.digest[:12]}…"


def _not_finite(checkpoint: Checkpoint, progress: Progress) -> Iterator[str]:
    """Tensors, scales among them, that have NaN or Inf; those that are dense once loaded, as they are then."""
    for name in checkpoint.names():
        tensor = checkpoint.load(name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            yield f"tensor {name} has values that are not finite"
        progress.advance(tensor.nbytes)
        del tensor  # or its pages stay mapped
        checkpoint.release()


def _is_finite(tensor: torch.Tensor) -> bool:
    tiles = tensor.reshape(-1).split(_TILE_VALUES)
    return all(bool(tile.float().isfinite().all()) for tile in tiles)


def _card_problems(checkpoint: Checkpoint, directory: Path, card: Mapping[str, Any]) -> Iterator[str]:
    """Where a card says something else than the files: which tensors are quantized, in what, and how large all are."""
    stated = card.get("tensors")
    if not isinstance(stated, dict):
        yield f"{CARD} does not say which tensors are quantized"
        return
    found = _quantized(checkpoint, directory)
    for name in sorted(found.keys() | stated.keys()):
        entry = stated.get(name)
        claimed = entry.get("scheme") if isinstance(entry, dict) else None
        if claimed != found.get(name):
            yield f"tensor {name} is {found.get(name, 'dense')}, and {CARD} says {claimed or 'nothing of it'}"
    sizes = card.get("size_bytes")
    size = sum(checkpoint.spec(name).nbytes for name in checkpoint.names())
    if not isinstance(sizes, dict) or sizes.get("after") != size:
        claimed = sizes.get("after") if isinstance(sizes, dict) else None
        yield f"the tensors take {size:,} bytes, and {CARD} says {claimed}"


def _quantized(checkpoint: Checkpoint, directory: Path) -> dict[str, str]:
    """The schemes of the tensors that are stored as codes, by the names that the source had them under."""
    scheme_of = schemes_of(dict(read_config(directory).quantization or {}))
    modules = {
        name.removesuffix(suffix)
        for name in checkpoint.names()
        for suffix in (".weight_packed", ".weight")
        if name.endswith(suffix) and checkpoint.spec(name).dtype in _CODES
    }
    return {f"{module}.weight": str(getattr(scheme_of(module), "name", None)) for module in modules}
