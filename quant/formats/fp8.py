"""`quantization_config` of FP8 weights with `weight_scale_inv`, as transformers and DeepSeek's copies state it."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from quant.errors import MistralError
from quant.formats import covers, names
from quant.schemes.fp8 import Fp8

HEAD = "lm_head"
_DEFAULT_BLOCK = (128, 128)
_SKIPPED = ("modules_to_not_convert", "ignored_layers")


def read(config: Mapping[str, Any]) -> Callable[[str], Fp8 | None]:
    """How a module's weight is stored, unless it is in an ordinary type. Without a list of modules the head is dense.

    Raises:
        MistralError: what is stored is of a kind that is not supported; it is named.
    """
    scheme = _scheme(config)
    listed = [config[key] for key in _SKIPPED if config.get(key) is not None]
    dense = names(_SKIPPED[0], listed[0]) if listed else [HEAD]

    def scheme_of(module: str) -> Fp8 | None:
        return None if any(covers(one, module) for one in dense) else scheme

    return scheme_of


def _scheme(config: Mapping[str, Any]) -> Fp8:
    if (config.get("fmt") or "e4m3") != "e4m3":
        _refuse("fmt", config["fmt"])
    scale_format = config.get("scale_fmt") or "float"
    if scale_format not in ("float", "ue8m0"):
        _refuse("scale_fmt", scale_format)
    block = config.get("weight_block_size", _DEFAULT_BLOCK)
    if block is not None:
        block = tuple(block)
        if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            _refuse("weight_block_size", config["weight_block_size"])
    return Fp8(block, exponents=scale_format == "ue8m0")


def _refuse(key: str, value: object) -> NoReturn:
    raise MistralError(
        f"FP8 weights with {key} = {value!r} are not supported",
        "supported are e4m3 weights with a factor for each block, or one for each weight",
    )
