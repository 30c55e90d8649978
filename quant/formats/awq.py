"""AWQ's `quantization_config`, as AutoAWQ, GPTQModel and transformers write it."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from quant.errors import MistralError
from quant.formats import covers, group_size, names
from quant.schemes.awq import BITS, Awq

HEAD = "lm_head"


def read(config: Mapping[str, Any]) -> Callable[[str], Awq | None]:
    """Which scheme a module has: all linears but the head and those that `modules_to_not_convert` covers.

    Raises:
        MistralError: what is stored is of a kind that is not supported; it is named.
    """
    scheme = _scheme(config)
    dense = [HEAD, *names("modules_to_not_convert", config.get("modules_to_not_convert"))]

    def scheme_of(module: str) -> Awq | None:
        return None if any(covers(one, module) for one in dense) else scheme

    return scheme_of


def _scheme(config: Mapping[str, Any]) -> Awq:
    for key in ("version", "checkpoint_format", "format"):
        if str(config.get(key) or "gemm").lower() != "gemm":
            _refuse(key, config[key])
    if config.get("bits", BITS) != BITS:
        _refuse("bits", config["bits"])
    if config.get("zero_point", True) is not True:
        _refuse("zero_point", config["zero_point"])
    for key in ("dynamic", "desc_act"):
        if config.get(key):
            _refuse(key, config[key])
    if config.get("pack_dtype", "int32") != "int32":
        _refuse("pack_dtype", config["pack_dtype"])
    return Awq(group_size(config["group_size"]))


def _refuse(key: str, value: object) -> NoReturn:
    raise MistralError(
        f"AWQ weights with {key} = {value!r} are not supported",
        "supported are 4 bits with zero points in the layout gemm",
    )
