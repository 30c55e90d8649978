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

_TOOL = "nvidia-smi"
_TIMEOUT_S = 10
_NO_DEVICES = "No devices were found"
_REINSTALL = "reinstall the driver, or restart the machine"


def check_cuda(context: Context) -> Iterator[Finding]:
    devices, warned = _cuda_devices()
    if not devices:
        yield from guarded("cuda", partial(_without_devices, warned))
        return
    driver = None
    try:
        driver = _driver_version()
    except MistralError as error:
        yield Finding("nvidia-smi", "note", f"{error.message}; torch can use the devices", error.hint)
    for device in devices:
        yield from guarded(str(device), partial(_examine_device, device, driver))


def usable_devices() -> list["torch.device"]:
    """The CPU and each CUDA device that torch can use."""
    import torch

    return [torch.device("cpu"), *_cuda_devices()[0]]


def _cuda_devices() -> tuple[list["torch.device"], list[str]]:
    """The CUDA devices that torch can use, and what it warns of while it looks for them."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(n_devices)], [str(one.message) for one in caught]


def _driver_version() -> str | None:
    """The version of the NVIDIA driver, by its own tool; None where there is no such tool, or no device.

    Raises:
        MistralError: the tool fails, as it does when the driver does.
    """
    tool = shutil.which(_TOOL)
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace")
    except subprocess.TimeoutExpired:
        raise MistralError(f"{_TOOL} did not answer in {_TIMEOUT_S} s", "restart the machine") from None
    except OSError as error:
        raise MistralError(f"{tool} cannot be run: {error.strerror}", _REINSTALL) from error
    said = (done.stdout + done.stderr).strip().partition("\n")[0]
    if _NO_DEVICES in said:
        return None
    if done.returncode:
        raise MistralError(f"{_TOOL} fails: {said or f'status {done.returncode}'}", _REINSTALL)
    return said


def _without_devices(warned: list[str]) -> Iterator[Finding]:
    """Why torch sees no device: there is none, it is hidden, torch has no CUDA, or the driver is too old for it.

    Raises:
        MistralError: the driver does not work.
    """
    import torch

    if shutil.which(_TOOL) is None:
        yield Finding("cuda", "ok", "no NVIDIA driver here: models run on the CPU")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("cuda", "note", "CUDA_VISIBLE_DEVICES hides all devices: models run on the CPU")
    elif (driver := _driver_version()) is None:
        yield Finding("cuda", "note", "the NVIDIA driver finds no device: models run on the CPU")
    elif torch.version.cuda is None:
        yield Finding(
            "cuda",
            "problem",
            f"there is an NVIDIA driver ({driver}), but torch {torch.__version__} is built without CUDA",
            "install a build that has it, which is PyPI's for Linux: pip install --force-reinstall torch",
        )
    else:
        why = "".join(f": {reason}" for reason in warned[:1])
        yield Finding(
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
