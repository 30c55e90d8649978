"""Which device and type a model runs with, and how much memory it has."""

from collections.abc import Collection, Iterator
from pathlib import Path

import psutil
import torch

from mistralcli.errors import UsageError
from mistralcli.nvml import process_bytes
from quant.memory import is_out_of_memory as is_out_of_memory
from quant.memory import out_of_memory_as as out_of_memory_as

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

CPU_CHUNK, CUDA_CHUNK, LARGE_CUDA_CHUNK = 512, 2048, 8192
LARGE_CUDA_SLACK = 2048
LARGE_CUDA_BYTES = 16 * 10**9
"""With that much room on a GPU chunks are large, since weights are dequantized once for each, and so are the pieces
that attention takes of them, since a small one does not fill a large GPU."""

OUTSIDE_TORCH_BYTES = 720 << 20
"""What a process takes on a GPU beside torch's own: CUDA's context, kernels, captured graphs. 0.66 GiB on an H100."""

_CGROUP_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    "": ("memory.max", "memory.current", "file", "shmem"),
}
"""By the controller's name, which version 2 leaves empty: the files with limit and use, and two keys of memory.stat."""


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


def default_chunk(device: torch.device, room_bytes: int) -> int:
    """Tokens of a prompt that go through the matmuls at once, with so much memory to be had."""
    if device.type != "cuda":
        return CPU_CHUNK
    return LARGE_CUDA_CHUNK if room_bytes >= LARGE_CUDA_BYTES else CUDA_CHUNK


def free_memory_bytes(device: torch.device) -> int:
    """Memory that this process may still take: on the CPU what is available, within the control group's limit."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    rooms = cgroup_rooms_bytes(own_cgroups(), Path("/sys/fs/cgroup"))
    return min([int(psutil.virtual_memory().available), *rooms])


def room_bytes(device: torch.device, limit_bytes: int | None) -> int:
    """What a model may take: the free memory, and no more than a limit on the process leaves beside CUDA's own."""
    free_bytes = free_memory_bytes(device)
    if limit_bytes is None:
        return free_bytes
    outside = outside_torch_bytes(device) if device.type == "cuda" else 0
    return max(0, min(free_bytes, limit_bytes - outside))


def outside_torch_bytes(device: torch.device) -> int:
    """What this process takes, and will take, on a CUDA device beside what torch allocates."""
    taken = process_bytes(device)
    now = 0 if taken is None else taken - torch.cuda.memory_reserved(device)
    return max(now, OUTSIDE_TORCH_BYTES)


def taken_bytes(device: torch.device) -> int:
    """What this process takes on a CUDA device in all: as the driver says, else torch's memory and the usual rest."""
    return process_bytes(device) or torch.cuda.memory_reserved(device) + OUTSIDE_TORCH_BYTES


def cap_memory(device: torch.device, size_bytes: int) -> None:
    """Let torch take no more than that on a CUDA device; it gives back what it keeps unused before it fails."""
    _, total_bytes = torch.cuda.mem_get_info(device)
    fraction = min(1.0, size_bytes / total_bytes)
    torch.cuda.set_per_process_memory_fraction(
        fraction, torch.cuda.current_device() if device.index is None else device.index
    )


def own_cgroups() -> str:
    """Which control groups this process is in, as Linux lists them."""
    groups = Path("/proc/self/cgroup")
    return groups.read_text() if groups.is_file() else ""


def cgroup_folders(groups: str, root: Path, controllers: Collection[str]) -> Iterator[tuple[str, Path]]:
    """The folders of a process's control groups and of those above them, each behind the controller that it is for.

    groups: the content of /proc/self/cgroup. root: where control groups are mounted. Version 1 keeps a controller in
    a folder of its own, version 2 has one tree without a name. A container may see paths that are not mounted in it;
    those above them count.
    """
    for line in groups.splitlines():
        _, names, path = line.split(":", 2)
        for name in set(names.split(",")).intersection(controllers):
            group = Path(path.lstrip("/"))
            yield from ((name, root / name / above) for above in (group, *group.parents))


def cgroup_rooms_bytes(groups: str, root: Path) -> list[int]:
    """What a process's control groups and those above them still let it take, for each that limits memory.

    groups and root as in `cgroup_folders`.
    """
    rooms = (_room_bytes(folder, name) for name, folder in cgroup_folders(groups, root, _CGROUP_FILES))
    return [room for room in rooms if room is not None]


def _room_bytes(folder: Path, controller: str) -> int | None:
    """Limit less use, where the page cache does not count: it is given back on demand, but for what tmpfs holds."""
    limit, usage, cache, shmem = _CGROUP_FILES[controller]
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit_bytes - used_bytes + int(stat.get(cache, 0)) - int(stat.get(shmem, 0))
    except (OSError, ValueError):  # not there, or the limit is "max"
        return None
