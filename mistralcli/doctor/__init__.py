"""`mistral doctor`: is this machine, and this installation, as it should be?

Each check is a function that yields findings. Its module imports torch and other heavy packages inside it, so that
one which cannot even be imported is a finding too.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from mistralcli.doctor import bandwidth, cuda, golden, hub, kernels, program, settings, system
from mistralcli.doctor.findings import Check, Context, Finding, guarded

__all__ = ["CHECKS", "Context", "Finding", "examine"]

CHECKS: tuple[Check, ...] = (
    system.check_python,
    system.check_torch,
    cuda.check_cuda,
    system.check_memory,
    system.check_disk,
    program.check_path,
    settings.check_settings,
    hub.check_hub,
    kernels.check_kernels,
    golden.check_demo,
    bandwidth.check_bandwidth,
)


def examine(context: Context, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """Run the checks and yield what each finds as soon as it is known. Raises nothing."""
    for check in checks:
        yield from guarded(check.__name__.removeprefix("check_"), partial(check, context))
