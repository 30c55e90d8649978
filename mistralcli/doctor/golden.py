"""The demo model's golden completion, replayed on every device with the engine that `mistral run` uses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mistralcli.config import read_json
from mistralcli.demo import demo_directory
from mistralcli.doctor.cuda import usable_devices
from mistralcli.doctor.findings import Context, Finding, guarded
from mistralcli.errors import IntegrityError
from mistralcli.store import REINSTALL

if TYPE_CHECKING:
    import torch

    from mistralcli.engine import Engine

GOLDEN_FILE = "golden.json"

_FILES = ("config.json", "model.safetensors", "tokenizer.model", GOLDEN_FILE)


@dataclass(frozen=True)
class Golden:
    """A greedy completion by the reference operators in float32.

    After the prompt and the ids before it, `completion_ids[i]` had the highest logit, `gaps[i]` above the second.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    gaps: list[float]


def read_golden(directory: Path) -> Golden:
    """The golden completion that is stored with a model.

    Raises:
        IntegrityError: it is missing or damaged.
    """
    path = directory / GOLDEN_FILE
    try:
        golden = Golden(**read_json(path))
    except TypeError as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
    fields = ((golden.prompt_ids, int), (golden.completion_ids, int), (golden.gaps, float))
    if not all(isinstance(values, list) and {*map(type, values)} == {kind} for values, kind in fields):
        raise IntegrityError(f"{path} is damaged: it has not lists of integers and of decimal numbers")
    if len(golden.completion_ids) != len(golden.gaps):
        raise IntegrityError(f"{path} has not one gap for each id")
    return golden


@contextmanager
def _from_the_package() -> Iterator[None]:
    """What is damaged in the package is got again by installing it, not by pulling a model."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(error.message, REINSTALL) from error


def check_demo(context: Context) -> Iterator[Finding]:
    yield from examine_demo(demo_directory())


def examine_demo(directory: Path) -> Iterator[Finding]:
    """Replay the golden completion of the model in `directory` on every device."""
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        message = f"the installation is incomplete: {', '.join(missing)} missing from {directory}"
        yield Finding("demo", "problem", message, REINSTALL)
        return
    with _from_the_package():
        golden = read_golden(directory)
    for device in usable_devices():
        name = f"demo ({device})"
        yield from guarded(name, partial(_examine_device, name, directory, golden, device))


def _examine_device(name: str, directory: Path, golden: Golden, device: "torch.device") -> Iterator[Finding]:
    from mistralcli.doctor.cases import LOGIT_BOUND, ROUNDED_LOGIT_BOUND
    from mistralcli.run_options import SessionOptions
    from mistralcli.session import open_session
    from quant.schemes.affine import AffineLinear

    with _from_the_package():
        kv = "float32" if device.type == "cpu" else None  # the bound is that of a cache as it is computed
        engine = open_session(directory, SessionOptions(device=str(device), kv=kv)).engine
    choices = replay(engine, golden)
    linears = (module for module in engine.model.modules() if isinstance(module, AffineLinear))
    rounds = any(linear.interleaved is not None for linear in linears)
    bound = ROUNDED_LOGIT_BOUND if rounds else LOGIT_BOUND[engine.model.dtype]
    yield judge(name, golden, choices, bound)


def replay(engine: "Engine", golden: Golden) -> list[int]:
    """The ids with the highest logit when the engine is made to say the golden completion."""
    choices: list[int] = []

    def choose(logits: "torch.Tensor", so_far: Sequence[int]) -> int:
        choices.append(int(logits.argmax()))
        return golden.completion_ids[len(choices) - 1]

    for _ in engine.generate(golden.prompt_ids, choose, max_tokens=len(golden.completion_ids)):
        pass
    return choices


def judge(name: str, golden: Golden, choices: list[int], bound: float) -> Finding:
    """Another choice is a problem where the golden one's lead is above `bound`."""
    differing = [i for i, (a, b) in enumerate(zip(golden.completion_ids, choices, strict=True)) if a != b]
    n_tokens = len(choices)
    wrong = [i for i in differing if golden.gaps[i] > bound]
    if wrong:
        first = wrong[0]
        return Finding(
            name,
            "problem",
            f"{len(wrong)} of {n_tokens} tokens are wrong, first token {first}: {choices[first]} instead of "
            f"{golden.completion_ids[first]}, which leads by {golden.gaps[first]:.2g} (bound {bound:.2g})",
            "see whether MISTRAL_CLI_KERNELS=reference helps: then a kernel is at fault; report it",
        )
    close = f"; {len(differing)} differ where the lead is below {bound:.2g}" if differing else ""
    return Finding(name, "ok", f"{n_tokens - len(differing)} of {n_tokens} tokens as they should be{close}")
