"""Schemes, that is what is stored for a quantized weight: by name, and of the layers of a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from quant.errors import MistralError, UsageError
from quant.formats import awq, bitsandbytes, compressed_tensors, fp8, gptq
from quant.linear import QuantizedLinear
from quant.method import Rounding
from quant.methods.rtn import round_to_nearest
from quant.schemes.affine import GROUP_SIZES, Affine
from quant.schemes.dense import DenseAtLoad
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8
from quant.tensors import TensorSpec

DEFAULT_INT4_GROUP_SIZE = 128


class LinearScheme(Protocol):
    """How a linear layer's weight (out_features, in_features) is stored and multiplied with. Immutable."""

    def linear(self, in_features: int, out_features: int) -> QuantizedLinear:
        """An empty layer, which says what a checkpoint stores and takes it."""
        ...


class Scheme(LinearScheme, Protocol):
    """One that we also write."""

    @property
    def name(self) -> str:
        """int4-g128, int4-g64-asym, int8, int8-g128, nf4, llm.int8 and so on."""
        ...

    @property
    def max_error(self) -> float:
        """The relative error (Frobenius) that no sound weight exceeds: a build's default quality gate."""
        ...

    def for_in_features(self, in_features: int) -> "Scheme":
        """What a layer gets instead, where this scheme's groups do not divide its in_features."""
        ...

    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The tensors that `quantize` will return, by suffix: a build's size is known before it is made."""
        ...

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, rounding: Rounding = round_to_nearest
    ) -> dict[str, torch.Tensor]:
        """The tensors to store under `<module>.<suffix>`; `dtype` is the model's, and that of scales.

        bitsandbytes' schemes choose their codes themselves: they know round to nearest only.
        """
        ...


def parse_scheme(
    bits: int | None = None, scheme: str | None = None, group_size: int | None = None, symmetric: bool = True
) -> Scheme:
    """The scheme that a command line asks for: `bits` or the scheme's name, or neither for int4.

    group_size: columns that share a scale, 0 for a whole row; None is 128 for int4 and a whole row for int8.

    Raises:
        UsageError: a value is unknown, or two of them exclude each other.
    """
    name = {None: "int4", 4: "int4", 8: "int8"}.get(bits, "") if scheme is None else scheme
    own_bits = {"int4": 4, "int8": 8, "nf4": 4, "llm.int8": 8}.get(name)
    if own_bits is None:
        raise UsageError(
            f"there is no scheme {scheme!r}" if scheme is not None else f"there is no scheme of {bits} bits",
            "choose --bits 4 or 8, or one of int4, int8, nf4, llm.int8",
        )
    if bits not in (None, own_bits):
        raise UsageError(f"{name} has {own_bits} bits a weight, not {bits}", "leave out --bits or --scheme")
    if name.startswith("int"):
        return _affine(own_bits, group_size, symmetric)
    if group_size is not None or not symmetric:
        raise UsageError(
            f"{name} has no choice of groups or zero points", "leave out --group-size and --asymmetric"
        )
    return Float4() if name == "nf4" else LlmInt8()


def _affine(bits: int, group_size: int | None, symmetric: bool) -> Affine:
    if group_size not in (None, 0, *GROUP_SIZES):
        raise UsageError(
            f"a group size of {group_size} is not offered", "choose 32, 64, 128, or 0 for whole rows"
        )
    if group_size is None and bits == 4:
        group_size = DEFAULT_INT4_GROUP_SIZE
    return Affine(bits, group_size or None, symmetric)


def default_head_scheme(scheme: Scheme) -> Scheme | None:
    """What an untied head gets in a build whose layers have `scheme`; None where it stays dense.

    It stays dense beside bitsandbytes' schemes, which know one scheme only, and beside asymmetric layers:
    transformers 5.23 reads these with `dequantize=True` alone, and then takes the first scheme for all.
    """
    return Affine(8) if isinstance(scheme, Affine) and scheme.symmetric else None


def quantization_config(schemes: Mapping[str, Scheme], dense: Sequence[str], dtype: str) -> dict[str, Any]:
    """The `quantization_config` of a build: `schemes` by full module name, `dense` the linears left dense,
    `dtype` the model's.
    """
    kinds = set(schemes.values())
    if all(isinstance(scheme, Affine) for scheme in kinds):
        return compressed_tensors.write(cast(Mapping[str, Affine], schemes), list(dense))
    if len(kinds) > 1:
        names = " and ".join(sorted(scheme.name for scheme in kinds))
        raise UsageError(f"one build cannot hold {names}", "leave the head dense")
    return bitsandbytes.write(cast(Float4 | LlmInt8, kinds.pop()), dtype)


def schemes_of(config: Mapping[str, Any]) -> Callable[[str], LinearScheme | DenseAtLoad | None]:
    """From a checkpoint's `quantization_config`: how a module's weight is stored, by its full name; None is as it is.

    Raises:
        MistralError: the weights are stored in a way that is not supported; it is named.
    """
    readers: Mapping[
        object, Callable[[Mapping[str, Any]], Callable[[str], LinearScheme | DenseAtLoad | None]]
    ] = {
        "compressed-tensors": compressed_tensors.read,
        "bitsandbytes": bitsandbytes.read,
        "gptq": gptq.read,
        "awq": awq.read,
        "fp8": fp8.read,
    }
    method = config.get("quant_method")
    reader = readers.get(method) if isinstance(method, str) else None
    if reader is None:
        raise MistralError(
            f"the quantization method {method!r} is not supported",
            f"supported are {', '.join(map(str, readers))}",
        )
    try:
        return reader(config)
    except KeyError as error:
        raise MistralError(f"quantization_config has no value for {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MistralError(f"quantization_config has a value of the wrong kind: {error}") from error
