"""Operators: a plain-PyTorch reference and, by device, the kernels that stand in for it.

    @op(cuda="quant.kernels.int4_triton:int4_matmul")
    def int4_matmul(x, qweight, scales, zeros): ...

The function that carries the decorator is the definition: its docstring is the mathematics and its body is
what a kernel is tested against. A kernel is named by a string, `module:function`, so that Triton or numba is
imported only when a tensor of that device first meets the operator; where it cannot be imported, the reference
runs. `MISTRAL_CLI_KERNELS=reference` turns every kernel off: everything still works, slowly.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)  # without a handler, a warning is a line on stderr

_OPS: dict[str, "Op[Any, Any]"] = {}


class Op(Generic[P, R]):
    """A reference function and the kernels that replace it on some devices; call it like the function.

    The device of the first tensor argument chooses: `cpu`, `cuda`; any other device runs the reference.
    """

    def __init__(self, reference: Callable[P, R], kernels: Mapping[str, str]) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.kernels = dict(kernels)
        self._loaded: dict[str, Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor), f"{self.name}: the first argument chooses the device"
        return self._usable(first.device.type)(*args, **kwargs)

    def _usable(self, device_type: str) -> Callable[P, R]:
        """`on`, or the reference where the kernel cannot be imported: a slower run, with one line that says so."""
        try:
            return self.on(device_type)
        except ImportError as error:
            _log.warning("%s runs slowly on %s, without its kernel: %s", self.name, device_type, error)
            self._loaded[device_type] = self.reference
            return self.reference

    def on(self, device_type: str) -> Callable[P, R]:
        """What runs on a device: its kernel, imported now if need be, or the reference where it has none.

        Raises:
            ImportError: it has a kernel, which cannot be imported.
        """
        chosen = self._loaded.get(device_type)
        if chosen is None:
            chosen = self._loaded[device_type] = self._load(device_type)
        return chosen

    def _load(self, device_type: str) -> Callable[P, R]:
        target = self.kernels.get(device_type)
        if target is None or os.environ.get("MISTRAL_CLI_KERNELS") == "reference":
            return self.reference
        module, _, name = target.partition(":")
        kernel: Callable[P, R] = getattr(importlib.import_module(module), name)
        return kernel


def op(**kernels: str) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an operator of a reference function; `kernels` maps a device type to `module:function`."""

    def register(reference: Callable[P, R]) -> Op[P, R]:
        made = Op(reference, kernels)
        _OPS[f"{reference.__module__}:{made.name}"] = made
        return made

    return register


def all_ops() -> Mapping[str, Op[Any, Any]]:
    """Every operator imported so far, by `module:function`; the test that walks them holds each kernel to it."""
    return _OPS
