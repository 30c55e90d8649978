"""What becomes of each tensor of a checkpoint in a build, decided from shapes alone."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from quant.errors import UsageError
from quant.scheme import Scheme
from quant.tensors import TensorSpec, TensorSpecs

HEAD = "lm_head"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LAYER_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_ORIGINAL = "quantize the original model in bfloat16, float16 or float32"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the source, and what the build stores for it: `stored` by full name; no scheme is a copy."""

    name: str
    spec: TensorSpec
    scheme: Scheme | None
    stored: Mapping[str, TensorSpec]

    @property
    def module(self) -> str:
        """The layer that the tensor belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def n_weights(self) -> int:
        return math.prod(self.spec.shape)

    @property
    def stored_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.stored.values())


def plan_tensors(
    source: TensorSpecs,
    scheme: Scheme,
    head_scheme: Scheme | None,
    *,
    tied: bool,
    dtype: torch.dtype,
    exceptions: Mapping[str, Scheme | None] | None = None,
) -> list[PlannedTensor]:
    """The build's tensors by name: the layers' linears in `scheme`, the head in `head_scheme`, all else as it is.

    exceptions: what some of these modules get instead, by full name; None is dense. With tied embeddings there is
    no head; one that the source has all the same is left out.

    Raises:
        UsageError: the source is quantized already, or has no layers that could be.
    """
    linears = set(linear_modules(source, tied=tied))
    default = dict.fromkeys(linears, scheme) | ({HEAD: head_scheme} if HEAD in linears else {})
    chosen = default | dict(exceptions or {})
    planned = []
    for name in sorted(source.names()):
        module, _, kind = name.rpartition(".")
        if tied and module == HEAD:
            continue
        spec = _float_spec(name, source)
        own = chosen.get(module) if kind == "weight" else None
        if own is None:
            planned.append(PlannedTensor(name, spec, None, {name: spec}))
        else:
            planned.append(_quantized(name, module, spec, own, dtype))
    if all(tensor.scheme is None for tensor in planned):
        raise UsageError("the model has no linear layers to quantize", "name a Mistral checkpoint")
    return planned


def linear_modules(source: TensorSpecs, *, tied: bool) -> list[str]:
    """The full names of the modules that can be quantized: the layers' linears and an untied head."""
    modules = {name.rpartition(".")[0] for name in source.names()}
    return sorted(m for m in modules if _LAYER_LINEAR.fullmatch(m) or (m == HEAD and not tied))


@dataclass(frozen=True)
class Unit:
    """Tensors that are written together and then recorded as done; `index` is that of their layer, if any."""

    index: int | None
    tensors: Sequence[PlannedTensor]


def units_by_layer(planned: Sequence[PlannedTensor]) -> list[Unit]:
    """What is outside of the layers, then each layer, in the order in which the model computes them."""
    by_index: dict[int, list[PlannedTensor]] = {}
    for tensor in planned:
        by_index.setdefault(layer_index(tensor.name), []).append(tensor)
    return [Unit(None if index < 0 else index, by_index[index]) for index in sorted(by_index)]


def units_as_they_come(planned: Sequence[PlannedTensor], names: Sequence[str]) -> list[Unit]:
    """Tensors in the order of `names`, those of one layer that follow one another together."""
    by_name = {tensor.name: tensor for tensor in planned}
    ordered = [by_name[name] for name in names if name in by_name]
    runs = groupby(ordered, key=lambda tensor: layer_index(tensor.name))
    return [Unit(None if index < 0 else index, list(tensors)) for index, tensors in runs]


def units_together(planned: Sequence[PlannedTensor], together: Sequence[Sequence[str]]) -> list[Unit]:
    """A unit for each list of names, in its order."""
    by_name = {tensor.name: tensor for tensor in planned}
    return [Unit(None, [by_name[name] for name in names if name in by_name]) for names in together]


def layer_index(name: str) -> int:
    """Which layer a tensor is of, −1 for none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _float_spec(name: str, source: TensorSpecs) -> TensorSpec:
    spec = source.spec(name)
    if spec.dtype not in _FLOATS:
        raise UsageError(f"{name} is a {spec.dtype} tensor, which cannot be quantized", _ORIGINAL)
    return spec


def _quantized(name: str, module: str, spec: TensorSpec, scheme: Scheme, dtype: torch.dtype) -> PlannedTensor:
    if len(spec.shape) != 2:
        raise UsageError(f"{name} has shape {list(spec.shape)}, which is no matrix to quantize", _ORIGINAL)
    out_features, in_features = spec.shape
    fitting = scheme.for_in_features(in_features)
    specs = fitting.specs(out_features, in_features, dtype)
    return PlannedTensor(name, spec, fitting, {f"{module}.{suffix}": spec for suffix, spec in specs.items()})


def stored_specs(tensors: Iterable[PlannedTensor]) -> dict[str, TensorSpec]:
    """What is stored for several tensors, by full name."""
    return {name: spec for tensor in tensors for name, spec in tensor.stored.items()}


def into_shards(planned: Sequence[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Tensors by file name, in their order; a file exceeds `max_bytes` only where one tensor does."""
    shards = list(_cut(planned, max_bytes))
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _cut(planned: Sequence[PlannedTensor], max_bytes: int) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    size = 0
    for tensor in planned:
        if shard and size + tensor.stored_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.stored_bytes
    yield shard
