"""What a model sees of a checkpoint's tensors: weights that it holds dense appear so, whatever they are stored in."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mistralcli.config import ModelConfig
from mistralcli.errors import IntegrityError
from quant.scheme import schemes_of
from quant.schemes.dense import DenseAtLoad
from quant.schemes.gptq import Gptq
from quant.tensors import TensorSpec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class DenseWeight:
    """A weight that is made of several stored tensors: `parts` are their names, in the order of the suffixes."""

    module: str
    scheme: DenseAtLoad
    parts: tuple[str, ...]
    parts_bytes: int
    spec: TensorSpec

    def made_of(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """The weight, on the device of its parts. IntegrityError, naming the module, where they do not fit together."""
        try:
            by_suffix = dict(zip(self.scheme.suffixes, tensors, strict=True))
            return self.scheme.dense(by_suffix, self.spec.dtype)
        except IntegrityError as error:
            raise IntegrityError(f"{self.module}: {error.message}", error.hint) from error


@dataclass(frozen=True)
class SeenTensors:
    """specs: of the tensors that a model sees. dense: those of them that are made of others, by name.

    zeros: names of tensors that are not among them, since they are to be all zeros: biases that change nothing.
    """

    specs: Mapping[str, TensorSpec]
    dense: Mapping[str, DenseWeight] = field(default_factory=dict)
    zeros: Sequence[str] = ()


def seen_tensors(stored: Mapping[str, TensorSpec], config: ModelConfig, directory: object) -> SeenTensors:
    """What the model that `config` describes sees of the tensors `stored`, by their Hugging Face names.

    What it sees already, it sees as it is. `directory` is where they are, for messages.

    Raises:
        IntegrityError: a part of a weight is missing, or of a wrong shape or type; it is named.
        MistralError: the quantization is of a kind that is not supported; it is named.
    """
    if config.quantization is None:
        return SeenTensors(stored)
    scheme_of = schemes_of(dict(config.quantization))
    seen, zeros = dict(stored), []
    dense: dict[str, DenseWeight] = {}
    for module, specs in _by_module(stored):
        scheme = scheme_of(module)
        if isinstance(scheme, DenseAtLoad) and scheme.applies(specs):
            weight = _dense_weight(module, scheme, specs, config, directory)
            for suffix in specs.keys() & {*scheme.suffixes, *scheme.unused}:
                del seen[f"{module}.{suffix}"]
            seen[f"{module}.weight"] = weight.spec
            dense[f"{module}.weight"] = weight
        elif isinstance(scheme, Gptq) and "bias" in specs:  # AutoGPTQ used to write them for every layer
            del seen[f"{module}.bias"]
            zeros.append(f"{module}.bias")
    return SeenTensors(seen, dense, zeros)


def _by_module(stored: Mapping[str, TensorSpec]) -> Iterator[tuple[str, dict[str, TensorSpec]]]:
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in stored.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = spec
    yield from modules.items()


def _dense_weight(
    module: str, scheme: DenseAtLoad, specs: Mapping[str, TensorSpec], config: ModelConfig, directory: object
) -> DenseWeight:
    missing = [suffix for suffix in scheme.suffixes if suffix not in specs]
    if missing:
        raise IntegrityError(
            f"tensor {module}.{missing[0]} is missing in {directory}",
            "the checkpoint is incomplete or of another model",
        )
    try:
        shape = scheme.shape(specs)
    except IntegrityError as error:
        raise IntegrityError(f"{module} in {directory}: {error.message}", error.hint) from error
    spec = TensorSpec(shape, _DTYPES.get(config.dtype, torch.bfloat16))
    parts = tuple(f"{module}.{suffix}" for suffix in scheme.suffixes)
    parts_bytes = sum(specs[suffix].nbytes for suffix in scheme.suffixes)
    return DenseWeight(module, scheme, parts, parts_bytes, spec)
