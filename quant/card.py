"""`quantization_card.json`: where a build comes from, what was done to it, and what was lost."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import IntegrityError
from quant.plan import PlannedTensor

FORMAT_VERSION = 1
"""Of the build format, docs/format.md; a change that an older reader would misread increases it."""

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Gate:
    """The quality gate: no tensor's relative error may exceed `max_error`."""

    max_error: float
    worst_tensor: str
    worst_error: float

    @property
    def passed(self) -> bool:
        return self.worst_error <= self.max_error


def gate(errors: Mapping[str, float], max_error: float) -> Gate:
    """The tensor that lost most, and whether that is too much."""
    worst = max(errors, key=errors.__getitem__)
    return Gate(max_error, worst, errors[worst])


def bits_per_weight(tensors: Iterable[PlannedTensor]) -> float:
    """Stored bits, scales and all, per weight."""
    tensors = list(tensors)
    return 8 * sum(tensor.stored_bytes for tensor in tensors) / sum(tensor.n_weights for tensor in tensors)


def card(
    source: Mapping[str, Any],
    scheme_name: str,
    planned: Sequence[PlannedTensor],
    errors: Mapping[str, float],
    verdict: Gate,
) -> dict[str, Any]:
    """The card as JSON; docs/format.md explains each value. `errors`: relative ones of the quantized tensors."""
    schemes = {tensor.name: tensor.scheme for tensor in planned if tensor.scheme is not None}
    return {
        "format_version": FORMAT_VERSION,
        "source": source,
        "scheme": scheme_name,
        "method": "rtn",
        "size_bytes": {
            "before": sum(tensor.spec.nbytes for tensor in planned),
            "after": sum(tensor.stored_bytes for tensor in planned),
        },
        "bits_per_weight": {
            "quantized": bits_per_weight(tensor for tensor in planned if tensor.scheme is not None),
            "all": bits_per_weight(planned),
        },
        "gate": {**vars(verdict), "passed": verdict.passed},
        "tensors": {
            name: {"scheme": scheme.name, "relative_error": errors[name]} for name, scheme in schemes.items()
        },
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
