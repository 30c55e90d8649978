"""From a model on this machine to a build: what is to be made, whether it fits in memory, and the making of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mistralcli.calibration import LayerwiseCalibration
from mistralcli.calibration_text import (
    DEFAULT_TOKENS,
    SELF,
    CalibrationSize,
    calibration_size,
    sampling_bytes,
    text_of_file,
    text_of_model,
)
from mistralcli.check import check_build, needed_bytes
from mistralcli.config import hugging_face_config, read_config
from mistralcli.errors import NotEnoughMemoryError, UsageError
from mistralcli.layerwise import LayerwiseModel
from mistralcli.units import size_text
from mistralcli.weights import open_checkpoint
from quant.build_plan import BuildPlan, Model, Recipe, open_model, plan_build
from quant.checkpoint import BuildReport, OnProgress, decided_plan, quantize_checkpoint
from quant.keep import parse_rule
from quant.memory import (
    PROCESS_BYTES,
    Peak,
    hidden_bytes,
    out_of_memory_as,
    peak_with_data,
    peak_without_data,
)
from quant.methods.table import METHODS
from quant.quality import Check, LeftOut, Quality
from quant.scheme import Scheme, default_head_scheme
from quant.schemes.affine import Affine


@dataclass(frozen=True)
class CalibrationChoice:
    """What a calibration is to look at: `text` is the path of a file or `self`."""

    text: str
    size: CalibrationSize


@dataclass(frozen=True)
class Job:
    """A build to be made of the model in `directory`, which the user calls `name`."""

    name: str
    directory: Path
    model: Model
    recipe: Recipe
    calibration: CalibrationChoice | None = None

    def plan(self) -> BuildPlan:
        """What the build will hold; for a target size, the smallest that it may be."""
        return plan_build(self.model, self.recipe)

    def decided_plan(self, on_progress: OnProgress) -> BuildPlan:
        """What the build will hold. For a target size the weights are read to measure what is worth 8 bits."""
        is_measured = self.recipe.target_bytes is not None
        calibration = self._calibration(on_progress) if is_measured else None
        return decided_plan(self.model, self.recipe, calibration, self._device(), on_progress)

    def peak(self, *, check: bool = False) -> Peak:
        """What making it takes of memory at most, and checking it."""
        choice = self.calibration
        peak = peak_of(self.plan(), self.recipe.method.name, None if choice is None else choice.size)
        if choice is not None and choice.text == SELF:
            peak = replace(peak, sampling=PROCESS_BYTES + sampling_bytes(self.directory, choice.size))
        checking = PROCESS_BYTES + needed_bytes(self.directory) + self._held_bytes()
        return replace(peak, check=checking) if check else peak

    def _held_bytes(self) -> int:
        """A calibration's hidden states, which are still there while the build is checked."""
        choice = self.calibration
        return (
            0
            if choice is None
            else hidden_bytes(self.plan().tensors, choice.size.n_seqs * choice.size.n_tokens)
        )

    def require_memory(self, max_bytes: int, *, check: bool) -> None:
        """NotEnoughMemoryError where it may take more than `max_bytes`; the hint says what would fit."""
        checking = self.peak(check=check).check
        needed = self.peak().total
        if needed <= max_bytes < checking:
            raise NotEnoughMemoryError(
                f"the check takes up to {size_text(checking)}, more than the {size_text(max_bytes)} of --max-ram",
                f"--no-check leaves that out: {size_text(needed)} are enough for the rest",
            )
        if needed > max_bytes:
            raise NotEnoughMemoryError(
                f"this takes up to {size_text(needed)}, more than the {size_text(max_bytes)} of --max-ram",
                self._what_fits(max_bytes),
            )

    def _what_fits(self, max_bytes: int) -> str:
        plan, choice = self.plan(), self.calibration
        least = peak_of(plan, "rtn", None).total
        if least > max_bytes:
            return f"the least is {size_text(least)}, for a method without data"
        without = "a method without data, like --method hqq or rtn"
        if choice is None:
            return f"{size_text(least)} are enough for {without}"
        smaller = (replace(self, calibration=one) for one in _smaller(choice))
        fitting = next((job.calibration for job in smaller if job.peak().total <= max_bytes), None)
        if fitting is None:
            return f"{size_text(least)} are enough for {without}"
        text = "" if fitting.text == choice.text else "--calib with a file and "
        return f"{text}--calib-tokens {fitting.size.n_seqs * fitting.size.n_tokens} would fit, or {without}"

    def build(
        self,
        destination: Path,
        max_error: float | None,
        *,
        max_kl: float | None = None,
        check: bool = True,
        max_bytes: int | None = None,
        replace: bool,
        resume: bool,
        on_progress: OnProgress,
    ) -> BuildReport:
        """Make it; as `quantize_checkpoint`. max_bytes: what the check may take of memory beside the program."""
        is_pulled = self.directory.parent.name == "snapshots"
        return quantize_checkpoint(
            self.model.source,
            self.directory,
            destination,
            self.recipe.scheme,
            head_scheme=self.recipe.head_scheme,
            method=self.recipe.method,
            calibration=self._calibration(on_progress),
            keep=self.recipe.keep,
            target_bytes=self.recipe.target_bytes,
            config=self.model.config,
            source_name=self.name,
            revision=self.directory.resolve().name if is_pulled else None,
            max_error=max_error,
            check=self._check(max_bytes, on_progress) if check else None,
            max_kl=max_kl,
            replace=replace,
            resume=resume,
            device=self._device(),
            on_progress=on_progress,
        )

    def _calibration(self, on_progress: OnProgress) -> LayerwiseCalibration | None:
        """The hidden states before the first layer; a text that the model writes is shown as of its bytes."""
        if self.calibration is None:
            return None
        with out_of_memory_as(
            "memory ran out while the text to calibrate on was made",
            "name a text with --calib FILE, or fewer --calib-tokens",
        ):
            return self._calibrated(self.calibration, on_progress)

    def _calibrated(self, choice: CalibrationChoice, on_progress: OnProgress) -> LayerwiseCalibration:
        size, total = choice.size, self.model.source.hash_bytes()
        if choice.text == SELF:
            text = text_of_model(
                self.directory,
                size,
                self._device(),
                lambda done, steps: on_progress(total * done // steps, total),
            )
        else:
            text = text_of_file(self.directory, Path(choice.text), size)
        model = LayerwiseModel(self.directory, device=self._device())
        return LayerwiseCalibration(model, text.token_ids, text.name)

    def _check(self, max_bytes: int | None, on_progress: OnProgress) -> Check:
        """Compares the build with its source; its progress is shown as of the bytes that were read of that."""
        total = self.model.source.hash_bytes()
        on_host = self._device().type == "cpu"  # a GPU's memory is not what --max-ram limits
        room = (
            max(0, max_bytes - PROCESS_BYTES - self._held_bytes())
            if max_bytes is not None and on_host
            else None
        )

        def check(directory: Path) -> Quality | LeftOut:
            return check_build(
                self.directory,
                directory,
                device=self._device(),
                free_bytes=room,
                on_progress=lambda done, steps: on_progress(total * done // steps, total),
            )

        return check

    def _device(self) -> torch.device:
        """A GPU where there is one that torch can use; its roundings are those of the CPU but for the last bit."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_job(
    name: str, directory: Path, recipe: Recipe, calib: str | None = None, calib_tokens: int | None = None
) -> Job:
    """A build of the model in `directory`, whose weights are checked by their headers.

    calib: what to calibrate on, the path of a text or `self`. calib_tokens: how much of it.

    Raises:
        UsageError: the method needs a calibration and has none, or has one that nothing needs.
        What `open_checkpoint` and `open_model` do.
    """
    needs_data = recipe.method.needs_data
    if needs_data and calib is None:
        raise UsageError(
            f"--method {recipe.method.name} needs a text to calibrate on",
            "name one with --calib FILE, or let the model write one with --calib self",
        )
    if calib is not None and not needs_data and recipe.target_bytes is None:
        raise UsageError(
            f"--method {recipe.method.name} looks at no text", "leave out --calib, or choose gptq or awq"
        )
    if calib is None and calib_tokens is not None:
        raise UsageError("--calib-tokens goes with --calib", "name a text with --calib FILE, or --calib self")
    config = read_config(directory)
    has_own_config = (directory / "config.json").is_file()
    hf_config = None if has_own_config else hugging_face_config(config)
    size = calibration_size(DEFAULT_TOKENS if calib_tokens is None else calib_tokens, config)
    choice = None if calib is None else CalibrationChoice(calib, size)
    return Job(name, directory, open_model(open_checkpoint(directory), directory, hf_config), recipe, choice)


def default_method(scheme: Scheme) -> str:
    """What loses least of the methods without data that take minutes (docs/quality.md)."""
    return "rtn-w" if isinstance(scheme, Affine) and scheme.bits == 4 else "rtn"


def recipe_of(scheme: Scheme, method: str | None, keep: Sequence[str], target_bytes: int | None) -> Recipe:
    """What a command line asks for.

    Raises:
        UsageError: the method is unknown, or the options do not go together.
    """
    method = default_method(scheme) if method is None else method
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"choose one of {', '.join(METHODS)}")
    rules = [parse_rule(text) for text in keep]
    recipe = Recipe(scheme, default_head_scheme(scheme), METHODS[method], rules, target_bytes)
    recipe.check()
    return recipe


def peak_of(plan: BuildPlan, method: str, size: CalibrationSize | None) -> Peak:
    """What a build takes of memory at most; `size` is that of a calibration, if there is one."""
    n_threads = torch.get_num_threads()
    if size is None:
        return peak_without_data(plan.tensors, n_threads)
    return peak_with_data(plan.tensors, n_threads, method=method, n_seqs=size.n_seqs, n_tokens=size.n_tokens)


def _smaller(choice: CalibrationChoice) -> Iterator[CalibrationChoice]:
    """Calibrations that take less memory, the largest first: with fewer sequences, and not written by the model."""
    texts = (choice.text,) if choice.text != SELF else (SELF, "a file")
    for text in texts:
        for n_seqs in range(choice.size.n_seqs, 0, -1):
            yield CalibrationChoice(text, replace(choice.size, n_seqs=n_seqs))
