"""compressed-tensors' `quantization_config` for `pack-quantized` int4 and int8 weights.

Verified against compressed-tensors 0.19 and 0.20, transformers 5.17 and 5.23, and vLLM 0.32.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from quant.errors import MistralError
from quant.formats import names
from quant.schemes.act_order import ActOrder
from quant.schemes.affine import Affine
from quant.schemes.dense import DenseAffine

FORMAT = "pack-quantized"
VERSION = "0.20.0"
"""Of compressed-tensors: the one whose configuration this is."""

EMBEDDING = "model.embed_tokens"
_CLASSES = {"Linear": rf"(?!{re.escape(EMBEDDING)}$)", "Embedding": rf"{re.escape(EMBEDDING)}$"}
"""By class: an expression for the names of its modules."""

Stored = Affine | ActOrder | DenseAffine


def read(config: Mapping[str, Any]) -> Callable[[str], Stored | None]:
    """Which scheme a linear layer or the embedding has, by its full name; None where it is dense.

    Targets and `ignore` hold exact names, `re:` and a regular expression that matches from the start of the
    name, or a class name, Linear or Embedding. An exact name goes before an expression, expressions in alphabetical
    order before the class.

    Raises:
        MistralError: what is stored is of a kind that is not supported; it is named.
    """
    _refuse_unsupported(config)
    ignored = [_pattern(target) for target in names("ignore", config.get("ignore"))]
    targets = sorted(_targets(config.get("config_groups")), key=lambda item: (_priority(item[0]), item[0]))
    patterns = [(_pattern(target), scheme) for target, scheme in targets]

    def scheme_of(module: str) -> Stored | None:
        if any(pattern.match(module) for pattern in ignored):
            return None
        found = next((scheme for pattern, scheme in patterns if pattern.match(module)), None)
        if module != EMBEDDING or found is None:
            return found
        if isinstance(found, ActOrder):
            _refuse("actorder", "group")
        return DenseAffine(found)

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


def _targets(groups: object) -> Iterator[tuple[str, Affine | ActOrder]]:
    if not isinstance(groups, dict):
        _refuse("config_groups", groups)
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            _refuse(name, group)
        for key, supported in (("format", FORMAT), ("input_activations", None), ("output_activations", None)):
            if group.get(key) not in (None, supported):
                _refuse(key, group[key])
        for target in names("targets", group.get("targets")):
            yield target, _scheme(group["weights"])


def _scheme(weights: Mapping[str, Any]) -> Affine | ActOrder:
    supported = {
        "type": ("int",),
        "strategy": ("group", "channel"),
        "num_bits": (4, 8),
        "dynamic": (False,),
        "actorder": (None, False, "weight", "static", True, "group"),
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
    affine = Affine(int(weights["num_bits"]), group_size, bool(weights.get("symmetric", True)))
    return ActOrder(affine) if by_group and weights.get("actorder") in (True, "group") else affine


def _priority(target: str) -> int:
    if target in _CLASSES:
        return 2
    return 1 if target.startswith("re:") else 0


def _pattern(target: str) -> re.Pattern[str]:
    """What matches the names that a target stands for."""
    if target in _CLASSES:
        return re.compile(_CLASSES[target])
    try:
        return re.compile(target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$")
    except re.error as error:
        raise MistralError(
            f"{target!r} in quantization_config is not a regular expression: {error}"
        ) from error


def write(schemes: Mapping[str, Affine], dense: list[str]) -> dict[str, Any]:
    """The configuration of a build: `schemes` by full module name, `dense` the linears left as they are.

    Modules of one scheme are named by regular expressions, and these are disjoint, so that every reader
    gives each layer the same scheme whatever the order it tries them in. Where all linears of one kind, like
    down_proj, have one scheme, the kind is named; else the layers' numbers and the kind are.
    """
    by_scheme: dict[Affine, set[str]] = {}
    for module, scheme in schemes.items():
        by_scheme.setdefault(scheme, set()).add(module)
    whole = _kinds_of_one_scheme([*schemes, *dense], by_scheme)
    n_kinds = {
        scheme: len({_kind(module) for module in found} & whole) for scheme, found in by_scheme.items()
    }
    largest_first = sorted(by_scheme.items(), key=lambda item: -n_kinds[item[0]])
    return {
        "config_groups": {
            f"group_{i}": _group(scheme, _named(modules, whole))
            for i, (scheme, modules) in enumerate(largest_first)
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


def _kind(module: str) -> str:
    """The last part of a module's name: down_proj, lm_head."""
    return module.rpartition(".")[2]


def _kinds_of_one_scheme(modules: Iterable[str], by_scheme: Mapping[Affine, set[str]]) -> set[str]:
    """The kinds whose modules all have the same scheme; none of them is dense."""
    every = Counter(map(_kind, modules))
    return {
        kind
        for found in by_scheme.values()
        for kind, count in Counter(map(_kind, found)).items()
        if count == every[kind]
    }


def _named(modules: set[str], whole: set[str]) -> list[str]:
    """Targets that name these modules: kinds of which they are all, and others by the numbers of their layers."""
    targets = []
    if kinds := {_kind(module) for module in modules} & whole:
        choice = "|".join(sorted(kinds))
        targets.append(f"re:.*({choice})$" if len(kinds) > 1 else f"re:.*{choice}$")
    layers: dict[str, list[int]] = {}
    for module in modules:
        if _kind(module) not in whole:
            layers.setdefault(_kind(module), []).append(int(module.split(".")[2]))
    alike: dict[tuple[int, ...], list[str]] = {}
    for kind, numbers in sorted(layers.items()):
        alike.setdefault(tuple(sorted(numbers)), []).append(kind)
    for shared, kinds_alike in alike.items():
        some = "|".join(map(str, shared))
        targets.append(rf"re:.*\.layers\.({some})\..*\.({'|'.join(kinds_alike)})$")
    return targets


def _group(scheme: Affine, targets: list[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": scheme.group_size,
            "num_bits": scheme.bits,
            "strategy": "channel" if scheme.group_size is None else "group",
            "symmetric": scheme.symmetric,
            "type": "int",
        },
    }
