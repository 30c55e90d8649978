"""Which device and type a model runs with, and how much memory it has."""

from pathlib import Path

import psutil
import torch

from mistralcli.errors import UsageError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

DEFAULT_CHUNK = {"cuda": 2048}
CPU_CHUNK = 512


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or without one CUDA where it is usable, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"this machine has no usable device {name!r}", "leave --device out, or ask for --device cpu"
        ) from error
    if device.type == "meta":
        raise UsageError("the device 'meta' holds no data", "leave --device out, or ask for --device cpu")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type to compute and cache in: bfloat16 on CUDA from compute capability 8.0, float16 below, else float32.

    Raises:
        UsageError: `name` is no type that a model can run in.
    """
    if name is not None:
        if name not in DTYPES:
            raise UsageError(
                f"--dtype {name} is not a type to compute in", f"choose one of {', '.join(DTYPES)}"
            )
        return DTYPES[name]
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if recent else torch.float16
    return torch.float32


def default_chunk(device: torch.device) -> int:
    """Tokens of a prompt that go through the matmuls at once."""
    return DEFAULT_CHUNK.get(device.type, CPU_CHUNK)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that this process may still take: on the CPU what is available, within the control group's limit."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    return min(int(psutil.virtual_memory().available), _cgroup_room_bytes())


def _cgroup_room_bytes() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        # The page cache counts as used, yet is given back on demand.
        cached = _stat_bytes(folder / "memory.stat", "file")
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else int(limit) - used + cached


def _stat_bytes(path: Path, key: str) -> int:
    fields = dict(line.split() for line in path.read_text().splitlines())
    return int(fields.get(key, 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch raises a plain RuntimeError for it."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))
