"""The kernel that each operator runs on each kind of device, against its reference on small inputs."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from mistralcli.doctor.cuda import usable_devices
from mistralcli.doctor.findings import Context, Finding, guarded

if TYPE_CHECKING:
    import torch

    from quant.registry import Op

_HINT = "MISTRAL_CLI_KERNELS=reference runs without kernels, slowly; report it, with what --json prints"


def check_kernels(context: Context) -> Iterator[Finding]:
    import mistralcli.ops
    import quant.ops
    from quant.registry import all_ops

    assert mistralcli.ops and quant.ops  # importing them registers their operators
    for device in usable_devices()[:2]:  # the CPU and one CUDA device: kernels go by the kind
        for name, one in all_ops().items():
            finding_name = f"{one.name} ({device.type})"
            yield from guarded(finding_name, partial(_examine_op, finding_name, name, one, device), _HINT)


def _examine_op(
    finding_name: str, name: str, one: "Op[..., object]", device: "torch.device"
) -> Iterator[Finding]:
    kernel = one.on(device.type)
    if kernel is one.reference:
        turned_off = device.type in one.kernels
        reason = "MISTRAL_CLI_KERNELS turns its kernel off" if turned_off else "it has no kernel here"
        yield Finding(finding_name, "note" if turned_off else "ok", f"plain PyTorch: {reason}")
        return
    from mistralcli.device import choose_dtype
    from mistralcli.doctor.cases import MAX_ERROR, cases

    dtype = choose_dtype(None, device)
    error = max(_max_error(one, case, device) for case in cases(dtype)[name])
    message = f"{one.kernels[device.type]}, max error {error:.1e} (at most {MAX_ERROR[dtype]:.0e})"
    if error <= MAX_ERROR[dtype]:
        yield Finding(finding_name, "ok", message)
    else:
        yield Finding(finding_name, "problem", message, _HINT)


def _max_error(one: "Op[..., object]", case: tuple[Any, ...], device: "torch.device") -> float:
    """The largest difference from the reference, relative to the largest value of its output; inf for no number."""
    import torch

    def arguments() -> list[Any]:
        """A copy for each: some operators write."""
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in case]
        return [value.to(device) if hasattr(value, "to") else value for value in copies]

    expected, out = one.reference(*arguments()), one.on(device.type)(*arguments())
    assert isinstance(expected, torch.Tensor) and isinstance(out, torch.Tensor)
    error = (out.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error.nan_to_num(nan=float("inf")))
