"""A checkpoint to a build: in bounded memory, complete or not at all, and gone on with where it was stopped.

Methods without data take one tensor at a time: it is mapped and what is stored for it is in memory, and both are let
go before the next. Methods with data take one layer at a time, since what it is given depends on those before it as
they are stored. `quant.memory` says how much that takes. What is done is recorded layer by layer (`quant.journal`).
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quant.build_plan import (
    COPIED_FILES,
    MAX_SHARD_BYTES,
    BuildPlan,
    Model,
    Recipe,
    adjustable,
    json_text,
    open_model,
    plan_build,
)
from quant.card import Gate, card, gate
from quant.errors import QualityError
from quant.files import file_hash, read_json
from quant.journal import Journal, check_settings
from quant.keep import KeepRule
from quant.memory import out_of_memory_as
from quant.method import Calibration, Method
from quant.methods.rtn import RTN
from quant.plan import PlannedTensor, Unit, units_as_they_come, units_by_layer, units_together
from quant.progress import Progress
from quant.quality import Check, LeftOut, Quality, default_max_kl
from quant.scheme import Scheme
from quant.sensitivity import Measure, check_target, pick_larger
from quant.staging import CARD, FORMAT_VERSION, finish_renamed, staged
from quant.steps import Pass, remove_states
from quant.tensors import TensorSource, TensorSpec
from quant.writing import ShardWriter, require_finite

__all__ = [
    "COPIED_FILES",
    "MAX_SHARD_BYTES",
    "BuildReport",
    "OnProgress",
    "TensorSource",
    "TensorSpec",
    "decided_plan",
    "quantize_checkpoint",
]

OnProgress = Callable[[int, int], None]
"""Called with the bytes read so far and in all."""


@dataclass(frozen=True)
class BuildReport:
    """What was made. Sizes are those of the tensors; `bits_per_weight` is that of the quantized ones.

    `n_layers_by_scheme` counts the quantized tensors by what they are stored in, the most frequent first. `quality` is
    what the card says of it.
    """

    path: Path
    size_before_bytes: int
    size_after_bytes: int
    bits_per_weight: float
    n_layers_by_scheme: Mapping[str, int]
    worst_tensor: str
    worst_error: float
    quality: Mapping[str, Any]
    seconds: float


def quantize_checkpoint(
    source: TensorSource,
    source_dir: Path,
    destination: Path,
    scheme: Scheme,
    *,
    head_scheme: Scheme | None,
    method: Method | None = None,
    calibration: Calibration | None = None,
    keep: Sequence[KeepRule] = (),
    target_bytes: int | None = None,
    config: Mapping[str, Any] | None = None,
    source_name: str | None = None,
    revision: str | None = None,
    together: Sequence[Sequence[str]] | None = None,
    max_error: float | None = None,
    check: Check | None = None,
    max_kl: float | None = None,
    replace: bool = False,
    resume: bool = False,
    device: torch.device | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Quantize the checkpoint `source` in `source_dir` into the new directory `destination` (docs/format.md).

    scheme: of the layers' linears. head_scheme: of an untied head, None to leave it dense
    (`default_head_scheme`). method: round to nearest by default. calibration: for a method that needs data; with a
    target size it also decides what is worth 8 bits. keep: other bits for some linears. target_bytes: the largest
    size that the build may have. config: a Hugging Face configuration, where `source_dir` has no config.json.
    source_name, revision: for the card. together: all names in the order of loading, in lists that are recorded as one,
    for a source of which only that much is known to be right; not for methods with data. max_error: the largest
    relative error (Frobenius) that a tensor may have; by default its scheme's. check: measures the build before it is
    put in place. max_kl: the largest mean KL that it may then have, by default its scheme's. replace: put the build in
    the place of another. resume: go on where an earlier process was stopped; the bytes are those of a build in one go.
    device: to quantize on, the CPU by default.

    Raises:
        UsageError: the source is quantized, the destination exists, options do not go together, or a half-made
            build was begun with others than these.
        IntegrityError: the source has no configuration, or a tensor with NaN or Inf, which is named.
        DiskError: the build does not fit on the disk, or cannot be written.
        NotEnoughMemoryError: memory ran out.
        QualityError: a tensor's error or the KL is above its limit. The build is there, its card marked as failed; but
            one that it was to replace stays.
    """
    started = time.monotonic()
    if resume and finish_renamed(destination):
        verdict = Gate.of_card(read_json(destination / CARD))
        if not verdict.passed:
            raise _gate_failed(verdict, f"{destination} is marked as failed")
        return _report(destination, started)
    model = open_model(source, source_dir, config)
    recipe = Recipe(scheme, head_scheme, method or RTN, keep, target_bytes, max_shard_bytes)
    plan = plan_build(model, recipe)
    if target_bytes is not None:
        check_target(plan, plan_build(model, recipe, adjustable(model, recipe)), target_bytes)
    limit = scheme.max_error if max_error is None else max_error
    most_kl = default_max_kl(scheme) if max_kl is None else max_kl
    settings = _settings(model, recipe, calibration, limit, device) | {
        "--max-kl": most_kl,
        "name": source_name,
        "revision": revision,
    }
    if resume:
        check_settings(destination, settings)
    needed_bytes = max(plan.size_bytes + plan.card_bytes, target_bytes or 0)
    with (
        staged(destination, needed_bytes=needed_bytes, replace=replace, resume=resume) as partial,
        out_of_memory_as("memory ran out", "choose a method that takes less, or give it a shorter text"),
    ):
        maker = _Maker(
            model, recipe, partial, Journal(partial, settings), calibration, device, on_progress, together
        )
        plan = maker.plan(plan)
        errors = maker.write(plan)
        for file in plan.copied:
            shutil.copyfile(file, partial / file.name)
        origin = {"name": source_name, "revision": revision, "files": source.hashes(maker.progress.advance)}
        for name, value in plan.json_files().items():
            (partial / name).write_text(json_text(value), encoding="utf-8")
        verdict, quality = _judged(gate(errors, limit, most_kl), check, partial)
        if destination.exists() and not verdict.passed:
            raise _gate_failed(verdict, f"{destination} stays as it was")
        files = {name: file_hash(partial / name, maker.progress.advance) for name in sorted(plan.files)}
        made = card(origin, recipe, calibration, plan.tensors, errors, verdict, quality, files)
        (partial / CARD).write_text(json_text(made), encoding="utf-8")
        remove_states(partial)
    if not verdict.passed:
        raise _gate_failed(verdict, f"{destination} is marked as failed")
    return _report(destination, started)


def _judged(verdict: Gate, check: Check | None, directory: Path) -> tuple[Gate, Quality | LeftOut]:
    """The verdict in view of what the check finds, for which a build whose tensors are too far off is too bad."""
    if check is None:
        return verdict, LeftOut("it was not asked for")
    if not verdict.errors_passed:
        return verdict, LeftOut("a tensor's error is above its limit")
    quality = check(directory)
    if isinstance(quality, LeftOut):
        return verdict, quality
    return replace(verdict, kl=quality.for_card()["kl"]["mean"]), quality


def decided_plan(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    on_progress: OnProgress | None = None,
) -> BuildPlan:
    """The build that `quantize_checkpoint` would make, measured where there is a target size; writes nothing.

    Raises:
        UsageError: the recipe cannot be, or there is no build of the target size.
    """
    plan = plan_build(model, recipe)
    if recipe.target_bytes is None:
        return plan
    check_target(plan, plan_build(model, recipe, adjustable(model, recipe)), recipe.target_bytes)
    progress = Progress(on_progress, sum(tensor.spec.nbytes for tensor in plan.tensors))
    measure = Measure(model, recipe, calibration, device, progress.advance)
    losses: dict[str, Sequence[float] | None] = {}
    for unit in units_by_layer(plan.tensors):
        losses |= measure(unit)
    return pick_larger(model, recipe, losses)


def _settings(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None,
    max_error: float,
    device: torch.device | None,
) -> dict[str, Any]:
    """All that a build's bytes follow from, as JSON: what is compared before an earlier process's work is used."""
    try:
        program = version("mistral-cli")
    except PackageNotFoundError:
        program = "unknown"
    is_on_gpu = device is not None and device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if is_on_gpu else torch.backends.cpu.get_cpu_capability()
    sums = {"threads": torch.get_num_threads(), "machine": machine} if calibration is not None else {}
    return {
        "source": dict(model.source.fingerprint()),
        "configuration": dict(model.config),
        "scheme": recipe.scheme.name,
        "scheme of the head": None if recipe.head_scheme is None else recipe.head_scheme.name,
        "method": recipe.method.name,
        "calibration": None if calibration is None else dict(calibration.description),
        "--keep": [str(rule) for rule in recipe.keep],
        "--target-size": recipe.target_bytes,
        "--max-error": max_error,
        "shards of": recipe.max_shard_bytes,
        "device": str(device or "cpu"),
        "format version": FORMAT_VERSION,
        "program": f"{program}, torch {torch.__version__}",
        **sums,
    }


class _Maker:
    """Does the two passes of a build, or what earlier processes left of them: to decide on bits, and to write."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        partial: Path,
        journal: Journal,
        calibration: Calibration | None,
        device: torch.device | None,
        on_progress: OnProgress | None,
        together: Sequence[Sequence[str]] | None,
    ) -> None:
        self._together = together
        self._model, self._recipe, self._partial = model, recipe, partial
        self._journal, self._calibration = journal, calibration
        self._device = device or torch.device("cpu")
        self.progress = Progress(on_progress, self._remaining_bytes())

    def _remaining_bytes(self) -> int:
        """What will be read: every tensor once for each pass, and every file, the build's too, for its hash."""
        passes = ("write",) if self._recipe.target_bytes is None else ("measure", "write")
        done = {(record["pass"], name) for record in self._journal.records for name in record["results"]}
        plan = plan_build(self._model, self._recipe)
        specs = {tensor.name: tensor.spec for tensor in plan.tensors}
        tensors = sum(spec.nbytes for p in passes for name, spec in specs.items() if (p, name) not in done)
        return tensors + self._model.source.hash_bytes() + plan.size_bytes

    def plan(self, plan: BuildPlan) -> BuildPlan:
        """`plan`, or for a target size that with 8 bits where they are worth most."""
        if self._recipe.target_bytes is None:
            return plan
        start = self._partial / "start.hidden"
        units = units_by_layer(plan.tensors)
        if self._calibration is not None:
            self._calibration.save(start)
        measuring = Pass("measure", units, self._journal, self._partial, self._calibration)
        measure = Measure(self._model, self._recipe, self._calibration, self._device, self.progress.advance)
        losses = measuring.run(measure, before_record=lambda: None)
        if self._calibration is not None:
            self._calibration.restore(start)
            start.unlink()
        return pick_larger(self._model, self._recipe, losses)

    def write(self, plan: BuildPlan) -> dict[str, float]:
        """Write all tensors; returns the relative error of each that is quantized, by its name."""
        by_layer = self._recipe.method.needs_data
        if by_layer:
            units = units_by_layer(plan.tensors)
        elif self._together is not None:
            units = units_together(plan.tensors, self._together)
        else:
            units = units_as_they_come(plan.tensors, self._model.source.names())
        calibration = self._calibration if by_layer else None
        writing = Pass("write", units, self._journal, self._partial, calibration)
        with ShardWriter(self._partial, plan.shards, self._model.dtype, writing.results) as writer:

            def work(unit: Unit) -> dict[str, float | None]:
                if calibration is not None and unit.index is not None:
                    return self._write_layer(writer, unit.index, unit.tensors, calibration)
                return {tensor.name: self._write_alone(writer, tensor) for tensor in unit.tensors}

            errors = writing.run(work, before_record=writer.sync)
        return {name: error for name, error in errors.items() if error is not None}

    def _write_alone(self, writer: ShardWriter, tensor: PlannedTensor) -> float | None:
        """One tensor by a method without data, or to nearest; returns its relative error."""
        weight = self._load(tensor)
        method = RTN if self._recipe.method.needs_data else self._recipe.method
        if tensor.scheme is None:
            error, _ = writer.write(tensor, weight)
        else:
            schemes = {tensor.name: tensor.scheme}
            prepared = method.prepare(-1, {tensor.name: weight}, schemes, self._model.dtype, None)
            error, _ = writer.write(tensor, prepared.weights[tensor.name], prepared.roundings[tensor.name])
            del prepared
        del weight  # or its pages stay mapped
        self._model.source.release()
        self.progress.advance(tensor.spec.nbytes)
        return error

    def _write_layer(
        self, writer: ShardWriter, index: int, tensors: Sequence[PlannedTensor], calibration: Calibration
    ) -> dict[str, float | None]:
        """One layer by a method with data, which then sees the next one's inputs as this one, stored, makes them."""
        loaded = {tensor.name: self._load(tensor).to(self._device) for tensor in tensors}
        schemes = {tensor.name: tensor.scheme for tensor in tensors if tensor.scheme is not None}
        prepared = self._recipe.method.prepare(index, loaded, schemes, self._model.dtype, calibration)
        weights, roundings = dict(prepared.weights), dict(prepared.roundings)
        del loaded, prepared
        errors: dict[str, float | None] = {}
        stored: dict[str, torch.Tensor] = {}
        for tensor in tensors:
            weight = weights.pop(tensor.name)
            if tensor.scheme is None:
                errors[tensor.name], _ = writer.write(tensor, weight)
                stored[tensor.name] = weight
            else:
                errors[tensor.name], linear = writer.write(tensor, weight, roundings.pop(tensor.name))
                assert linear is not None
                stored[tensor.name] = linear.dense_rows(0, linear.out_features)
            del weight
            self.progress.advance(tensor.spec.nbytes)
        self._model.source.release()
        calibration.advance(index, stored)
        return errors

    def _load(self, tensor: PlannedTensor) -> torch.Tensor:
        weight = self._model.source.load(tensor.name)
        require_finite(tensor.name, weight)
        return weight.to(self._device) if tensor.scheme is not None else weight


def _report(destination: Path, started: float) -> BuildReport:
    """What the card of a build says that it is."""
    made = read_json(destination / CARD)
    schemes = Counter(entry["scheme"] for entry in made["tensors"].values())
    return BuildReport(
        path=destination,
        size_before_bytes=made["size_bytes"]["before"],
        size_after_bytes=made["size_bytes"]["after"],
        bits_per_weight=made["bits_per_weight"]["quantized"],
        n_layers_by_scheme=dict(schemes.most_common()),
        worst_tensor=made["gate"]["worst_tensor"],
        worst_error=made["gate"]["worst_error"],
        quality=made["quality"],
        seconds=time.monotonic() - started,
    )


def _gate_failed(verdict: Gate, outcome: str) -> QualityError:
    if verdict.errors_passed:
        assert verdict.kl is not None
        return QualityError(
            f"the build's KL from its source is {verdict.kl:.4g} nats a token, above the limit of "
            f"{verdict.max_kl:.4g}; {outcome}",
            "choose smaller groups or more bits, or raise the limit with --max-kl",
        )
    return QualityError(
        f"{verdict.worst_tensor} has a relative error of {verdict.worst_error:.4f}, "
        f"above the limit of {verdict.max_error:.4f}; {outcome}",
        "choose smaller groups or more bits, or raise the limit with --max-error",
    )
