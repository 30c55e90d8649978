"""What this process takes on a GPU in all, as the driver counts it: NVML through ctypes, as nvidia-smi shows it."""

import ctypes
import os

import torch

_MOST_PROCESSES = 256


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, as of version 2 and 3 of the call."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def process_bytes(device: torch.device) -> int | None:
    """Memory that this process takes on a CUDA device, with its context; None where the driver does not tell.

    So it is in most containers, which see neither each other's processes nor their own numbers.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if library.nvmlInit_v2() != 0:
            return None
        try:
            return _used_bytes(library, uuid)
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError, RuntimeError):
        return None


def _used_bytes(library: ctypes.CDLL, uuid: bytes) -> int | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) != 0:
        return None
    count, processes = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
    if library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes) != 0:
        return None
    mine = [one.used_bytes for one in processes[: count.value] if one.pid == os.getpid()]
    return mine[0] if mine and mine[0] < 1 << 60 else None  # all ones: it is not known
