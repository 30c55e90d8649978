"""GPTQ's `quantization_config`, as AutoGPTQ, GPTQModel and transformers write it, or their quantize_config.json."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from quant.errors import MistralError
from quant.formats import group_size, names
from quant.schemes.gptq import Gptq

HEAD = "lm_head"
_LAYER_LINEAR = re.compile(r"model\.layers\.\d+\.(\w+\.\w+)")
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""By `checkpoint_format`: what is to be added to the zero points that are stored."""


def read(config: Mapping[str, Any]) -> Callable[[str], Gptq | None]:
    """Which scheme a module has: the linears of the layers, and the head only with `lm_head`.

    Raises:
        MistralError: what is stored is of a kind that is not supported; it is named.
    """
    scheme = _scheme(config)
    listed = config.get("modules_in_block_to_quantize") or []
    chosen = {name for group in listed for name in names("modules_in_block_to_quantize", group)}
    with_head = bool(config.get("lm_head"))

    def scheme_of(module: str) -> Gptq | None:
        if module == HEAD:
            return scheme if with_head else None
        in_layer = _LAYER_LINEAR.fullmatch(module)
        return scheme if in_layer and (not chosen or in_layer[1] in chosen) else None

    return scheme_of


def _scheme(config: Mapping[str, Any]) -> Gptq:
    stored_as = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored_as not in _ZERO_OFFSETS:
        _refuse("checkpoint_format", stored_as)
    if config.get("bits") not in (4, 8):
        _refuse("bits", config.get("bits"))
    if config.get("pack_dtype", "int32") != "int32":
        _refuse("pack_dtype", config["pack_dtype"])
    for key in ("dynamic", "is_marlin_format"):
        if config.get(key):
            _refuse(key, config[key])
    size = group_size(config["group_size"])
    return Gptq(int(config["bits"]), size, _ZERO_OFFSETS[stored_as], bool(config.get("sym", True)))


def _refuse(key: str, value: object) -> NoReturn:
    raise MistralError(
        f"GPTQ weights with {key} = {value!r} are not supported",
        "supported are 4 and 8 bits in int32 words, in the formats gptq and gptq_v2, of all layers alike",
    )
