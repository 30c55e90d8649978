"""compressed-tensors' `quantization_config` for `pack-quantized` int4 and int8 weights.

Verified against compressed-tensors 0.19 and 0.20, transformers 5.17 and 5.23, and vLLM 0.32.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from quant.errors import MistralError
from quant.formats import names
from quant.schemes.affine import Affine

FORMAT = "pack-quantized"
VERSION = "0.20.0"
"""Of compressed-tensors: the one whose configuration this is."""

_MODULE_CLASS = "Linear"


def read(config: Mapping[str, Any]) -> Callable[[str], Affine | None]:
    """Which scheme a linear layer has, by its full name; None where it is dense.

    Targets and `ignore` hold exact names, `re:` and a regular expression that matches from the start of the
    name, or the class name Linear. An exact name goes before an expression, expressions in alphabetical order
    before the class.

    Raises:
        MistralError: what is stored is of a kind that is not supported; it is named.
    """
    _refuse_unsupported(config)
    ignored = [_pattern(target) for target in names("ignore", config.get("ignore"))]
    targets = sorted(_targets(config.get("config_groups")), key=lambda item: (_priority(item[0]), item[0]))
    patterns = [(_pattern(target), scheme) for target, scheme in targets]

    def scheme_of(module: str) -> Affine | None:
        if any(pattern.match(module) for pattern in ignored):
            return None
        return next((scheme for pattern, scheme in patterns if pattern.match(module)), None)

    return scheme_of


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    supported = {"format": FORMAT, "quantization_status": "compressed"}
    for key, value in supported.items():
        if (config.get(key) or value) != value:
            _refuse(key, config[key])
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        # llm-compressor used to write a sparsity_config for dense weights too.
        if config.get(key) and not (key == "sparsity_config" and config[key].get("format") == "dense"):
            _refuse(key, config[key])


def _refuse(key: str, value: object) -> NoReturn:
    raise MistralError(
        f"compressed-tensors weights with {key} = {value!r} are not supported",
        f"supported are {FORMAT} int4 and int8 weights, by group or by channel",
    )


def _targets(groups: object) -> Iterator[tuple[str, Affine]]:
    if not isinstance(groups, dict):
        _refuse("config_groups", groups)
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            _refuse(name, group)
        for key, supported in (("format", FORMAT), ("input_activations", None), ("output_activations", None)):
            if group.get(key) not in (None, supported):
                _refuse(key, group[key])
        for target in names("targets", group.get("targets")):
            if target == "Embedding":
                _refuse("targets", target)
            yield target, _scheme(group["weights"])


def _scheme(weights: Mapping[str, Any]) -> Affine:
    supported = {
        "type": ("int",),
        "strategy": ("group", "channel"),
        "num_bits": (4, 8),
        "dynamic": (False,),
        "actorder": (None, "weight", "static"),
    }
    defaults = {"type": "int", "dynamic": False}
    for key, values in supported.items():
        value = weights.get(key, defaults.get(key))
        if value not in values:
            _refuse(key, value)
    by_group = weights["strategy"] == "group"
    if by_group and not isinstance(weights.get("group_size"), int):
        _refuse("group_size", weights.get("group_size"))
    group_size = weights["group_size"] if by_group else None
    return Affine(int(weights["num_bits"]), group_size, bool(weights.get("symmetric", True)))


def _priority(target: str) -> int:
    if target == _MODULE_CLASS:
        return 2
    return 1 if target.startswith("re:") else 0


def _pattern(target: str) -> re.Pattern[str]:
    """What matches the names that a target stands for."""
    if target == _MODULE_CLASS:
        return re.compile("")
    try:
        return re.compile(target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$")
    except re.error as error:
        raise MistralError(
            f"{target!r} in quantization_config is not a regular expression: {error}"
        ) from error


def write(schemes: Mapping[str, Affine], dense: list[str]) -> dict[str, Any]:
    """The configuration of a build: `schemes` by full module name, `dense` the linears left as they are.

    Modules of one scheme are named by one regular expression, and these are disjoint, so that every reader
    gives each layer the same scheme whatever the order it tries them in.
    """
    by_scheme: dict[Affine, set[str]] = {}
    for module, scheme in schemes.items():
        by_scheme.setdefault(scheme, set()).add(module.rpartition(".")[2])
    every = [name for names in by_scheme.values() for name in names]
    assert len(every) == len(set(every)), "layers of one kind must share a scheme"
    largest_first = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    return {
        "config_groups": {
            f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(largest_first)
        },
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": dense,
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _group(scheme: Affine, names: set[str]) -> dict[str, Any]:
    choice = "|".join(sorted(names))
    return {
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "targets": [f"re:.*({choice})$" if len(names) > 1 else f"re:.*{choice}$"],
        "weights": {
            "dynamic": False,
            "group_size": scheme.group_size,
            "num_bits": scheme.bits,
            "strategy": "channel" if scheme.group_size is None else "group",
            "symmetric": scheme.symmetric,
            "type": "int",
        },
    }
