"""What becomes of each tensor of a checkpoint in a build, decided from shapes alone."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quant.errors import UsageError
from quant.scheme import Scheme
from quant.tensors import TensorSource, TensorSpec

HEAD = "lm_head"
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
    source: TensorSource, scheme: Scheme, head_scheme: Scheme | None, *, tied: bool, dtype: torch.dtype
) -> list[PlannedTensor]:
    """The build's tensors: the layers' linears in `scheme`, the head in `head_scheme`, all else as it is.

    With tied embeddings there is no head; one that the source has all the same is left out.

    Raises:
        UsageError: the source is quantized already, or has no layers that could be.
    """
    planned = []
    for name in source.names():
        module, _, kind = name.rpartition(".")
        if tied and module == HEAD:
            continue
        spec = _float_spec(name, source)
        chosen = head_scheme if module == HEAD else scheme if _LAYER_LINEAR.fullmatch(module) else None
        if chosen is None or kind != "weight":
            planned.append(PlannedTensor(name, spec, None, {name: spec}))
        else:
            planned.append(_quantized(name, module, spec, chosen, dtype))
    if all(tensor.scheme is None for tensor in planned):
        raise UsageError("the model has no linear layers to quantize", "name a Mistral checkpoint")
    return planned


def _float_spec(name: str, source: TensorSource) -> TensorSpec:
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
