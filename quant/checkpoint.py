"""A checkpoint to a build: tensor by tensor, in bounded memory, complete or not at all.

At any time one tensor of the source is mapped and what is stored for it is in memory; both are let go before the
next. So the peak is at most the two largest tensors, a tile, and what Python and torch take themselves.
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.card import Gate, bits_per_weight, card, file_hash, gate
from quant.errors import IntegrityError, QualityError, UsageError
from quant.files import TOKENIZER_FILES, read_json
from quant.linear import QuantizedLinear
from quant.plan import HEAD, PlannedTensor, into_shards, plan_tensors
from quant.safetensors_file import SafetensorsWriter, file_size_bytes
from quant.scheme import Scheme, quantization_config
from quant.staging import CARD, staged
from quant.tensors import TensorSource, TensorSpec
from quant.tiles import map_tiles

__all__ = ["BuildReport", "TensorSource", "TensorSpec", "quantize_checkpoint"]

OnProgress = Callable[[int, int], None]
"""Called with the bytes read so far and in all."""

MAX_SHARD_BYTES = 2_000_000_000
COPIED_FILES = (*TOKENIZER_FILES, "LICENSE*", "NOTICE*")
"""What a build takes over unchanged. Not the README: it describes, and measures, the model before."""

_JSON_BYTES = 1 << 20
"""More than configuration, index and card take."""

_TILE_WEIGHTS = 1 << 19
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BuildReport:
    """What was made. Sizes are those of the tensors; `bits_per_weight` is that of the quantized ones.

    `n_layers_by_scheme` counts the quantized tensors by what they are stored in, the most frequent first.
    """

    path: Path
    size_before_bytes: int
    size_after_bytes: int
    bits_per_weight: float
    n_layers_by_scheme: Mapping[str, int]
    worst_tensor: str
    worst_error: float
    seconds: float


def quantize_checkpoint(
    source: TensorSource,
    source_dir: Path,
    destination: Path,
    scheme: Scheme,
    *,
    head_scheme: Scheme | None,
    config: Mapping[str, Any] | None = None,
    source_name: str | None = None,
    revision: str | None = None,
    max_error: float | None = None,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Quantize the checkpoint `source` in `source_dir` into the new directory `destination` (docs/format.md).

    scheme: of the layers' linears. head_scheme: of an untied head, None to leave it dense
    (`default_head_scheme`). config: a Hugging Face configuration, where `source_dir` has no config.json.
    source_name, revision: for the card. max_error: the largest relative error (Frobenius) that a tensor may have;
    by default its scheme's. replace: put the build in the place of another.

    Raises:
        UsageError: the source is quantized, or the destination exists.
        IntegrityError: the source has no configuration, or a tensor with NaN or Inf, which is named.
        DiskError: the build does not fit on the disk, or cannot be written.
        QualityError: a tensor's error is above its limit. The build is there, its card marked as failed; but one that
            it was to replace stays.
    """
    started = time.monotonic()
    hf_config = dict(read_json(source_dir / "config.json") if config is None else config)
    if hf_config.get("quantization_config"):
        raise UsageError(f"{source_dir} is quantized already", "quantize the model that it was made from")
    dtype = _model_dtype(hf_config)
    tied = bool(hf_config.get("tie_word_embeddings", False))
    planned = plan_tensors(source, scheme, head_scheme, tied=tied, dtype=dtype)
    shards = into_shards(planned, max_shard_bytes)
    copied = [file for pattern in COPIED_FILES for file in sorted(source_dir.glob(pattern)) if file.is_file()]
    progress = _Progress(on_progress, _total_bytes(planned, source))
    needed_bytes = _JSON_BYTES + sum(file.stat().st_size for file in copied) + _file_bytes(shards)
    with staged(destination, needed_bytes=needed_bytes, replace=replace) as partial:
        errors: dict[str, float] = {}
        for file_name, tensors in shards.items():
            errors |= _write_shard(partial / file_name, tensors, source, dtype, progress)
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        hashes = {file.name: file_hash(file, progress.advance) for file in source.files()}
        origin = {"name": source_name, "revision": revision, "files": hashes}
        verdict = gate(errors, scheme.max_error if max_error is None else max_error)
        if destination.exists() and not verdict.passed:
            raise _gate_failed(verdict, f"{destination} stays as it was")
        _write_json(partial / CARD, card(origin, scheme.name, planned, errors, verdict))
        if len(shards) > 1:
            _write_json(partial / "model.safetensors.index.json", _index(shards))
        _write_json(partial / "config.json", hf_config | _quantized_config(planned, dtype))
    if not verdict.passed:
        raise _gate_failed(verdict, f"{destination} is marked as failed")
    return BuildReport(
        path=destination,
        size_before_bytes=sum(tensor.spec.nbytes for tensor in planned),
        size_after_bytes=sum(tensor.stored_bytes for tensor in planned),
        bits_per_weight=bits_per_weight(tensor for tensor in planned if tensor.scheme is not None),
        n_layers_by_scheme=_count_schemes(planned),
        worst_tensor=verdict.worst_tensor,
        worst_error=verdict.worst_error,
        seconds=time.monotonic() - started,
    )


def _count_schemes(planned: Sequence[PlannedTensor]) -> dict[str, int]:
    return dict(Counter(tensor.scheme.name for tensor in planned if tensor.scheme is not None).most_common())


class _Progress:
    """Adds up the bytes that were read, and passes them on."""

    def __init__(self, report: OnProgress | None, total_bytes: int) -> None:
        self._report = report
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def advance(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        if self._report is not None:
            self._report(self._done_bytes, self._total_bytes)


def _total_bytes(planned: Sequence[PlannedTensor], source: TensorSource) -> int:
    """What will be read: every tensor once, and every file once more for its hash."""
    return sum(tensor.spec.nbytes for tensor in planned) + sum(file.stat().st_size for file in source.files())


def _file_bytes(shards: Mapping[str, Sequence[PlannedTensor]]) -> int:
    return sum(file_size_bytes(_stored_specs(tensors)) for tensors in shards.values())


def _stored_specs(tensors: Sequence[PlannedTensor]) -> dict[str, TensorSpec]:
    return {name: spec for tensor in tensors for name, spec in tensor.stored.items()}


def _write_shard(
    path: Path,
    tensors: Sequence[PlannedTensor],
    source: TensorSource,
    dtype: torch.dtype,
    progress: _Progress,
) -> dict[str, float]:
    """Write the tensors of one file; returns the relative error of each that is quantized, by its name."""
    errors = {}
    with SafetensorsWriter(path, _stored_specs(tensors)) as writer:
        for tensor in tensors:
            weight = source.load(tensor.name)
            _require_finite(tensor.name, weight)
            if tensor.scheme is None:
                writer.write(tensor.name, weight)
            else:
                errors[tensor.name] = _write_quantized(writer, tensor, tensor.scheme, weight, dtype)
            del weight  # or its pages stay mapped
            source.release()
            progress.advance(tensor.spec.nbytes)
    return errors


def _require_finite(name: str, weight: torch.Tensor) -> None:
    if weight.is_floating_point() and weight.numel():
        lowest, highest = weight.aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise IntegrityError(
                f"tensor {name} has values that are not finite ({lowest.item()} … {highest.item()})",
                "the model is damaged: pull it again",
            )


def _write_quantized(
    writer: SafetensorsWriter, tensor: PlannedTensor, scheme: Scheme, weight: torch.Tensor, dtype: torch.dtype
) -> float:
    """Quantize and write one weight; returns its relative error, measured on what was stored."""
    stored = scheme.quantize(weight, dtype)
    for suffix, part in stored.items():
        writer.write(f"{tensor.module}.{suffix}", part)
    out_features, in_features = weight.shape
    linear = scheme.linear(in_features, out_features)
    linear.load_stored(stored, torch.device("cpu"))
    error = _relative_error(weight, linear)
    if not math.isfinite(error):
        raise UsageError(f"{tensor.name} has values that {scheme.name} cannot hold", "choose another scheme")
    return error


def _relative_error(weight: torch.Tensor, linear: QuantizedLinear) -> float:
    """`‖w − ŵ‖ / ‖w‖` (Frobenius), a tile of rows at a time; of a weight that is all 0 the error is absolute."""

    def norms(rows: slice) -> tuple[float, float]:
        tile = weight[rows].float()
        difference = linear.dense_rows(rows.start, rows.stop) - tile
        return float(torch.linalg.vector_norm(difference)), float(torch.linalg.vector_norm(tile))

    tiles = map_tiles(norms, linear.out_features, max(1, _TILE_WEIGHTS // linear.in_features))
    error, norm = (math.hypot(*values) for values in zip(*tiles, strict=True))
    return error / (norm or 1.0)


def _quantized_config(planned: Sequence[PlannedTensor], dtype: torch.dtype) -> dict[str, Any]:
    """What the build's config.json says beyond, or instead of, the source's."""
    schemes = {tensor.module: tensor.scheme for tensor in planned if tensor.scheme is not None}
    dense = [] if HEAD in schemes else [HEAD]
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "quantization_config": quantization_config(schemes, dense, name)}


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json states; it is also that of the scales."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if name not in _DTYPES:
        raise UsageError(
            f"a model in {name} cannot be quantized", f"it must be in one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def _index(shards: Mapping[str, Sequence[PlannedTensor]]) -> dict[str, Any]:
    weight_map = {name: file for file, tensors in shards.items() for name in _stored_specs(tensors)}
    total_size = sum(tensor.stored_bytes for tensors in shards.values() for tensor in tensors)
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def _gate_failed(verdict: Gate, outcome: str) -> QualityError:
    return QualityError(
        f"{verdict.worst_tensor} has a relative error of {verdict.worst_error:.4f}, "
        f"above the limit of {verdict.max_error:.4f}; {outcome}",
        "choose smaller groups or more bits, or raise the limit with --max-error",
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
