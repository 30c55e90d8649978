"""How many threads the CPU computes with: torch's, in which our kernels run too (`quant.kernels.cpu.pool`).

One for each physical core that the process may use. Two threads of a core share the units that multiply, and where a
control group has a quota of processor time, threads beyond it only wait: the group is stopped until its next period,
and all for the last of them. torch's own default knows cores and the affinity mask, but no quota.
"""

import os
from collections.abc import Collection
from pathlib import Path

import torch

from mistralcli.device import cgroup_folders, own_cgroups
from mistralcli.errors import UsageError

_CONTROLLERS = ("cpu", "")
"""By version of the control groups; the second has no names."""


def set_threads(asked: int | None) -> None:
    """Compute with so many threads from now on; without a number, with `default_threads`, or as OMP_NUM_THREADS says.

    Raises:
        UsageError: fewer than one, or more than the processors that this process may use.
    """
    if asked is None:
        if not os.environ.get("OMP_NUM_THREADS"):  # which torch has followed
            torch.set_num_threads(default_threads())
        return
    most = len(usable_cpus())
    if asked < 1:
        raise UsageError(f"--threads {asked} must be at least 1", "leave it out for one a core")
    if asked > most:
        raise UsageError(
            f"--threads {asked} is more than the processors that this process may run on: {most}",
            "leave --threads out for a thread a core",
        )
    torch.set_num_threads(asked)


def default_threads() -> int:
    """Physical cores in the affinity mask, within what the control groups grant; at least one."""
    quotas = cgroup_cpus(own_cgroups(), Path("/sys/fs/cgroup"))
    return max(1, int(min([n_cores(usable_cpus()), *quotas])))


def usable_cpus() -> Collection[int]:
    """The numbers of the processors, hardware threads all, that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def n_cores(cpus: Collection[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores that these processors are threads of; each is its own where the system does not say."""

    def threads_beside(cpu: int) -> str:
        try:
            return (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            return str(cpu)

    return len({threads_beside(cpu) for cpu in cpus})


def cgroup_cpus(groups: str, root: Path) -> list[float]:
    """Processors' worth of time that the control groups of a process and those above them grant, where they limit it.

    groups and root as in `mistralcli.device.cgroup_folders`.
    """
    quotas = (_quota(folder) for _, folder in cgroup_folders(groups, root, _CONTROLLERS))
    return [quota for quota in quotas if quota is not None]


def _quota(folder: Path) -> float | None:
    """Microseconds a period by the period's length, from the files of either version."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            quota, period = (int((folder / f"cpu.cfs_{one}_us").read_text()) for one in ("quota", "period"))
    except (OSError, ValueError):  # not there, or the quota is "max"
        return None
    return quota / period if quota > 0 and period > 0 else None
