"""bitsandbytes' `quantization_config`, as transformers writes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from quant.errors import MistralError
from quant.formats import covers, names
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8

HEAD = "lm_head"
_STORAGES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""By `bnb_4bit_quant_storage`: the type that the bytes of the codes are stored as."""


def read(config: Mapping[str, Any]) -> Callable[[str], Float4 | LlmInt8 | None]:
    """Which scheme a module has. Without a list of skipped modules the head alone is dense."""
    scheme = _scheme(config)
    skipped = names("llm_int8_skip_modules", config.get("llm_int8_skip_modules")) or [HEAD]

    def scheme_of(module: str) -> Float4 | LlmInt8 | None:
        return None if any(covers(one, module) for one in skipped) else scheme

    return scheme_of


def _scheme(config: Mapping[str, Any]) -> Float4 | LlmInt8:
    if config.get("load_in_8bit"):
        return LlmInt8(float(config.get("llm_int8_threshold", 6.0)))
    quant_type = config.get("bnb_4bit_quant_type", "fp4")
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    if not config.get("load_in_4bit") or quant_type not in ("nf4", "fp4"):
        raise MistralError(
            f"bitsandbytes weights that are neither int8, nf4 nor fp4 are not supported ({quant_type})"
        )
    if storage not in _STORAGES:
        raise MistralError(
            f"bitsandbytes weights stored as {storage} (bnb_4bit_quant_storage) are not supported"
        )
    return Float4(quant_type, bool(config.get("bnb_4bit_use_double_quant")), _STORAGES[storage])


def write(scheme: Float4 | LlmInt8, dtype: str) -> dict[str, Any]:
    """The configuration of a build whose layers' linears have `scheme`; its head is dense, its dtype `dtype`."""
    four_bit = isinstance(scheme, Float4)
    return {
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": dtype if four_bit else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.quant_type if isinstance(scheme, Float4) else "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": scheme.threshold if isinstance(scheme, LlmInt8) else 6.0,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": "bitsandbytes",
    }
