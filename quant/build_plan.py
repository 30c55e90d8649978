"""What a build will hold and how large it will be, before anything is written: from shapes alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.errors import UsageError
from quant.files import TOKENIZER_FILES, read_json
from quant.keep import KeepRule, exceptions, require_mixable, with_precision
from quant.method import Method
from quant.methods.rtn import RTN
from quant.plan import HEAD, PlannedTensor, into_shards, linear_modules, plan_tensors, stored_specs
from quant.safetensors_file import file_size_bytes
from quant.scheme import Scheme, quantization_config
from quant.schemes.affine import Affine
from quant.tensors import TensorSource

MAX_SHARD_BYTES = 2_000_000_000
COPIED_FILES = (*TOKENIZER_FILES, "LICENSE*", "NOTICE*")
"""What a build takes over unchanged. Not the README: it describes, and measures, the model before."""

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

_CARD_BYTES = 8 << 10
"""More than a card takes besides its entries of tensors."""
_CARD_ENTRY_BYTES = 120
"""More than such an entry takes besides the tensor's name."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A model to quantize: its tensors, the directory that its other files are in, and its configuration."""

    source: TensorSource
    directory: Path
    config: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that config.json states; it is also that of the scales."""
        return _DTYPES[_dtype_name(self.config)]

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    def linears(self) -> list[str]:
        """The full names of the modules that can be quantized."""
        return linear_modules(self.source, tied=self.tied)


def open_model(source: TensorSource, directory: Path, config: Mapping[str, Any] | None = None) -> Model:
    """The model in `directory`. config: a Hugging Face configuration, where it has no config.json.

    Raises:
        IntegrityError: there is no configuration.
        UsageError: the model is quantized already, or in a dtype that cannot be quantized.
    """
    own = dict(read_json(directory / CONFIG) if config is None else config)
    if own.get("quantization_config"):
        raise UsageError(f"{directory} is quantized already", "quantize the model that it was made from")
    if _dtype_name(own) not in _DTYPES:
        raise UsageError(
            f"a model in {_dtype_name(own)} cannot be quantized", f"it must be in one of {', '.join(_DTYPES)}"
        )
    return Model(source, directory, own)


def _dtype_name(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How a build is made: with the model, all that its weights follow from.

    scheme: of the layers' linears. head_scheme: of an untied head, None to leave it dense. keep: other bits for some
    of them. target_bytes: the largest size that the build may have; linears get 4 or 8 bits by what that costs them.
    """

    scheme: Scheme
    head_scheme: Scheme | None
    method: Method = RTN
    keep: Sequence[KeepRule] = ()
    target_bytes: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES

    def check(self) -> None:
        """UsageError where its parts do not go together."""
        if self.method.name != "rtn" and not isinstance(self.scheme, Affine):
            raise UsageError(
                f"{self.scheme.name} chooses its codes itself, {self.method.name} does not go with it",
                "leave out --method, or choose int4 or int8",
            )
        if self.target_bytes is not None:
            require_mixable(self.scheme, "--target-size")
            if self.scheme.max_error < 0.1:
                raise UsageError(
                    f"--target-size chooses between 4 and 8 bits, and {self.scheme.name} has 8 for all",
                    "leave out --bits, or leave out --target-size",
                )


@dataclass(frozen=True)
class BuildPlan:
    """What a build will hold. `shards`: tensors by file. `files`: exact sizes of all files but the card."""

    tensors: Sequence[PlannedTensor]
    shards: Mapping[str, Sequence[PlannedTensor]]
    config: Mapping[str, Any]
    copied: Sequence[Path]

    @property
    def files(self) -> dict[str, int]:
        sizes = {name: file_size_bytes(stored_specs(tensors)) for name, tensors in self.shards.items()}
        sizes |= {file.name: file.stat().st_size for file in self.copied}
        return sizes | {name: len(json_text(value).encode()) for name, value in self.json_files().items()}

    @property
    def size_bytes(self) -> int:
        """Of all files but the card."""
        return sum(self.files.values())

    @property
    def card_bytes(self) -> int:
        """A bound of the card's size, which depends on how many digits its errors have."""
        quantized = [tensor.name for tensor in self.tensors if tensor.scheme is not None]
        return _CARD_BYTES + sum(len(name) + _CARD_ENTRY_BYTES for name in quantized)

    def json_files(self) -> dict[str, Mapping[str, Any]]:
        """The configuration, and where there are several files of weights their index."""
        return ({INDEX: self._index()} if len(self.shards) > 1 else {}) | {CONFIG: self.config}

    def _index(self) -> dict[str, Any]:
        weight_map = {name: file for file, tensors in self.shards.items() for name in stored_specs(tensors)}
        total_size = sum(tensor.stored_bytes for tensor in self.tensors)
        return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def plan_build(model: Model, recipe: Recipe, larger: Iterable[str] = ()) -> BuildPlan:
    """The build of a model. larger: the modules that get 8 bits for the sake of a target size.

    Raises:
        UsageError: the recipe cannot be, or the model has nothing to quantize.
    """
    recipe.check()
    chosen = exceptions(recipe.keep, model.linears(), recipe.scheme)
    chosen |= {module: with_precision(recipe.scheme, "8") for module in larger}
    planned = plan_tensors(
        model.source, recipe.scheme, recipe.head_scheme, tied=model.tied, dtype=model.dtype, exceptions=chosen
    )
    copied = [
        path for pattern in COPIED_FILES for path in sorted(model.directory.glob(pattern)) if path.is_file()
    ]
    return BuildPlan(
        planned,
        into_shards(planned, recipe.max_shard_bytes),
        {**model.config, **_quantized_config(model, planned)},
        copied,
    )


def adjustable(model: Model, recipe: Recipe) -> list[str]:
    """The modules whose bits a target size decides: the layers' linears that no rule speaks of."""
    ruled = exceptions(recipe.keep, model.linears(), recipe.scheme)
    return [module for module in model.linears() if module != HEAD and module not in ruled]


def _quantized_config(model: Model, planned: Sequence[PlannedTensor]) -> dict[str, Any]:
    """What the build's config.json says beyond, or instead of, the source's."""
    schemes = {tensor.module: tensor.scheme for tensor in planned if tensor.scheme is not None}
    dense = [module for module in model.linears() if module not in schemes]
    if HEAD not in (*schemes, *dense):
        dense.append(HEAD)  # a tied one
    name = str(model.dtype).removeprefix("torch.")
    return {"dtype": name, "quantization_config": quantization_config(schemes, dense, name)}


def json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
