"""A checkpoint's `quantization_config`, also where it is stated in other files and words than config.json's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistralcli.errors import MistralError
from quant.files import QUANTIZE_CONFIG, read_json


def of_hugging_face(stated: Mapping[str, Any], directory: Path) -> Mapping[str, Any] | None:
    """What config.json states, or where that is nothing AutoGPTQ's own file, which need not name its method."""
    path = directory / QUANTIZE_CONFIG
    if not stated and path.is_file():
        return {"quant_method": "gptq"} | read_json(path)
    return stated or None


def of_mistral(stated: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What params.json states under `quantization`, as config.json would.

    Raises:
        MistralError: it is not FP8 with a factor for each weight.
    """
    if not stated:
        return None
    kind, activations = stated.get("qformat_weight"), stated.get("qscale_act")
    if kind != "fp8_e4m3" or activations != "TENSOR":
        raise MistralError(
            f"weights that params.json calls {dict(stated)} are not supported, only fp8_e4m3 with TENSOR scales"
        )
    return {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["lm_head"],
    }
