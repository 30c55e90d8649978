"""NVIDIA driver and devices, and whether torch can use them."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from mistralcli.doctor.findings import Context, Finding, guarded
from mistralcli.errors import MistralError
from mistralcli.units import size_text

if TYPE_CHECKING:
    import torch

_TIMEOUT_S = 10


def check_cuda(context: Context) -> Iterator[Finding]:
    import torch

    driver = _driver_version()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_devices == 0:
        yield _without_devices(driver, [str(one.message) for one in caught])
    for index in range(n_devices):
        name = f"cuda:{index}"
        yield from guarded(name, partial(_examine_device, torch.device(name), driver))


def usable_devices() -> list["torch.device"]:
    """The CPU and each CUDA device that torch can use."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # check_cuda says why there is none
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(n_devices))]


def _driver_version() -> str | None:
    """The version of the NVIDIA driver, by its own tool; None where there is no such tool.

    Raises:
        MistralError: the driver is installed and does not work.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace")
    except subprocess.TimeoutExpired:
        raise MistralError(
            f"the NVIDIA driver did not answer in {_TIMEOUT_S} s", "restart the machine"
        ) from None
    if done.returncode:
        said = (done.stderr + done.stdout).strip().partition("\n")[0]
        raise MistralError(
            f"the NVIDIA driver does not work: {said}", "reinstall the driver, or restart the machine"
        )
    return done.stdout.partition("\n")[0].strip()


def _without_devices(driver: str | None, reasons: list[str]) -> Finding:
    """Why torch sees no device: there is none, it is hidden, torch has no CUDA, or the driver is too old for it."""
    import torch

    if driver is None:
        return Finding("cuda", "ok", "no NVIDIA driver here: models run on the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("cuda", "note", "CUDA_VISIBLE_DEVICES hides all devices: models run on the CPU")
    if torch.version.cuda is None:
        return Finding(
            "cuda",
            "problem",
            f"there is an NVIDIA driver ({driver}), but torch {torch.__version__} is built without CUDA",
            "install a build that has it, which is PyPI's for Linux: pip install --force-reinstall torch",
        )
    why = "".join(f": {reason}" for reason in reasons[:1])
    return Finding(
        "cuda",
        "problem",
        f"torch for CUDA {torch.version.cuda} can use no device with driver {driver}{why}",
        "update the driver, or install a build of torch for an older CUDA",
    )


def _examine_device(device: "torch.device", driver: str | None) -> Iterator[Finding]:
    import torch

    from mistralcli.device import choose_dtype

    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    dtype = choose_dtype(None, device)
    message = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"driver {driver or 'unknown'}, {size_text(free)} free of {size_text(total)}, "
        f"computing in {str(dtype).removeprefix('torch.')}"
    )
    yield Finding(str(device), "ok" if dtype == torch.bfloat16 else "note", message)
