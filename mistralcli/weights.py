"""Weights from disk to a model: Hugging Face's layout or Mistral's own, one tensor at a time.

On the CPU they are memory-mapped; to a GPU they go through pinned memory (`staged_reading`).
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from mistralcli.checkpoint_files import Checkpoint, find_weights, hugging_face_name
from mistralcli.config import ModelConfig, read_config
from mistralcli.dense_weights import seen_tensors
from mistralcli.errors import IntegrityError, MistralError
from mistralcli.model import Embedding, LinearFactory, Transformer, dense_linear
from quant.linear import QuantizedLinear
from quant.scheme import schemes_of
from quant.schemes.dense import DenseAtLoad
from quant.tensors import TensorSpec, TensorSpecs

OnProgress = Callable[[int, int], None]
"""Called with the bytes loaded so far and in all."""

_BULK = (".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".qweight", ".qzeros", ".scales")
"""The last parts of names of tensors that are read straight to a GPU; schemes look into the others on the CPU."""

_SCALES = {".weight_zero_point": ".weight_scale", ".qzeros": ".scales"}
"""The last parts of names: of zero points, and of their scales."""

_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq$")


class NamedTensors(TensorSpecs, Protocol):
    """Such tensors, and a name for the place that they are in."""

    @property
    def directory(self) -> object:
        """Where they are, for messages."""
        ...


def open_checkpoint(directory: Path) -> Checkpoint:
    """The weights in `directory`, their names, shapes and types checked against its configuration by headers alone.

    Raises:
        ModelNotFoundError: there are none.
        IntegrityError: a tensor is missing, extra or mis-shaped, or a file is damaged or missing; it is named.
        MistralError: the quantization, or the type of a tensor, is of a kind that is not supported; it is named.
    """
    checkpoint = find_weights(directory)
    check_tensors(read_config(directory), checkpoint)
    return checkpoint


def check_tensors(config: ModelConfig, tensors: NamedTensors) -> None:
    """Refuse tensors that are not those of the model that `config` describes; looks at names, shapes and types.

    Raises:
        IntegrityError, MistralError: as `open_checkpoint`.
    """
    stored = {name: tensors.spec(name) for name in tensors.names()}
    seen = seen_tensors(stored, config, tensors.directory)
    modules = _modules(_empty_model(config, torch.float32))
    _check_tensors(config, seen.specs, tensors.directory, modules, _all_expected(modules))


def load_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    exact: bool = False,
    on_progress: OnProgress | None = None,
) -> Transformer:
    """The model in `directory`, ready to run on `device`, its dense weights in `dtype`.

    `exact` leaves quantized layers as they are stored: they compute with activations that are not rounded.

    Tensors are loaded one at a time into a model without storage, so that peak memory is the loaded model plus
    one tensor. An embedding stays in the type it is stored in where `keeps_embedding` says so.

    Raises:
        IntegrityError: a tensor is missing, extra or mis-shaped, or a file is damaged; it is named.
        MistralError: the quantization is of a kind that is not supported; it is named.
    """
    config = read_config(directory)
    checkpoint = find_weights(directory)
    needed = _by_module(checkpoint, config)
    with (_staging if device.type == "cuda" else _mapping)(checkpoint, needed, device) as read:
        model = _empty_model(config, dtype).eval()
        modules = _modules(model)
        specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
        _check_tensors(config, specs, directory, modules, _all_expected(modules))
        sizes = {name: sum(specs[one].nbytes for one in needed[name]) for name in modules}
        done, total = 0, sum(sizes.values())
        types = {
            name: None if isinstance(module, Embedding) and keeps_embedding(config, device.type) else dtype
            for name, module in modules.items()
        }
        for name, tensors in zip(needed, read(_kept(modules, types, specs)), strict=True):
            module = modules[name]
            load_module(checkpoint, name, module, tensors, device, types[name])
            if isinstance(module, QuantizedLinear) and not exact:
                module.prepare()
            tensors.clear()  # before more is loaded
            done += sizes[name]
            if on_progress is not None:
                on_progress(done, total)
    return model


def load_module(
    checkpoint: Checkpoint,
    name: str,
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give a module that has tensors of its own those of `checkpoint` under its `name`; a quantized one as stored.

    dtype: of a dense weight; None keeps the one it is stored in.
    """
    if isinstance(module, QuantizedLinear):
        _load_quantized(checkpoint, name, module, tensors, device)
    else:
        module.weight = _parameter(tensors[f"{name}.weight"], device, dtype)


def load_kernels(model: Transformer) -> None:
    """Get the kernels of quantized layers before a prompt needs them: compiled, or loaded from where they are kept."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.load_kernels()


_Read = Callable[[Collection[str]], Iterator[dict[str, torch.Tensor]]]
"""Gives the tensors of module after module by their names, each set until the next is asked for.

It is told the names of tensors that are kept as they are stored, and may share memory.
"""


def _by_module(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, list[str]]:
    """The names of tensors by module, in the files' order, so that they are read from beginning to end."""
    by_module: dict[str, list[str]] = {}
    for name in sorted(checkpoint.names(), key=checkpoint.position):
        module, is_weight, _ = name.partition(".weight")  # to which bitsandbytes adds more than one part
        module = module if is_weight else name.rpartition(".")[0]
        if not (_IGNORED.match(name) or (config.tied_embeddings and module == "lm_head")):
            by_module.setdefault(module, []).append(name)
    return by_module


@contextmanager
def _mapping(
    checkpoint: Checkpoint, needed: Mapping[str, Sequence[str]], device: torch.device
) -> Iterator[_Read]:
    """Memory-mapped."""

    def read(kept: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
        for names in needed.values():
            yield {name: checkpoint.load(name) for name in names}
            checkpoint.release()

    yield read


@contextmanager
def _staging(
    checkpoint: Checkpoint, needed: Mapping[str, Sequence[str]], device: torch.device
) -> Iterator[_Read]:
    """The bulk of them on `device` already; they are read from the start."""
    all_names = [name for names in needed.values() for name in names]
    on_host = {name for name in all_names if not name.endswith(_BULK)}
    with checkpoint.staging(all_names, device) as staging:

        def read(kept: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
            arriving = checkpoint.staged(staging, all_names, kept, on_host)
            for names in needed.values():
                yield dict(zip(names, arriving))  # noqa: B905  those of this module, of all that are to arrive

        yield read


def _kept(
    modules: Mapping[str, nn.Module], types: Mapping[str, torch.dtype | None], specs: Mapping[str, TensorSpec]
) -> set[str]:
    """The names of tensors that modules hold as they are stored; `types` as in `load_module`, by module."""
    kept = set()
    for name, module in modules.items():
        if isinstance(module, QuantizedLinear):
            kept |= {f"{name}.{suffix}" for suffix in module.kept}
        elif types[name] in (None, specs[f"{name}.weight"].dtype):
            kept.add(f"{name}.weight")
    return kept


@dataclass(frozen=True)
class LoadedSizes:
    """Bytes of all weights once loaded, of a layer's largest tensor, and of the largest that is cast, as stored."""

    total: int
    largest_in_layer: int
    largest_cast: int


def keeps_embedding(config: ModelConfig, device_type: str) -> bool:
    """Whether the embedding stays in the type it is stored in: only the rows that are looked up are cast then.

    One that is the head too is multiplied as it is stored on the CPU, and elsewhere in the type that is computed in.
    """
    return not config.tied_embeddings or device_type == "cpu"


def loaded_sizes(directory: Path, dtype: torch.dtype, device_type: str) -> LoadedSizes:
    """What the weights in `directory` take to compute in `dtype`; reads headers only."""
    checkpoint = find_weights(directory)
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
    sizes = sizes_once_loaded(specs, keeps_embedding(read_config(directory), device_type), dtype)
    return replace(sizes, largest_cast=max(sizes.largest_cast, checkpoint.largest_parts_bytes))


def sizes_once_loaded(
    specs: Mapping[str, TensorSpec], keeps_embedding: bool, dtype: torch.dtype
) -> LoadedSizes:
    """The same for weights that need not be here: what a model sees, by Hugging Face name."""

    def is_cast(name: str) -> bool:
        kept = name == "model.embed_tokens.weight" and keeps_embedding
        has_codes = f"{name}.absmax" in specs  # bitsandbytes', in whatever type they are stored
        return name.endswith(".weight") and specs[name].dtype.is_floating_point and not (kept or has_codes)

    def size(name: str) -> int:
        spec = specs[name]
        for zeros, scales in _SCALES.items():
            if name.endswith(zeros):  # one int8 for each scale
                return math.prod(specs[name.removesuffix(zeros) + scales].shape)
        if name.endswith("g_idx"):  # an order of columns, in int64
            return math.prod(spec.shape) * torch.int64.itemsize
        if name.endswith(".absmax"):  # float32, whether they are stored so or nested
            return math.prod(spec.shape) * torch.float32.itemsize
        return math.prod(spec.shape) * (dtype if is_cast(name) else spec.dtype).itemsize

    sizes = {name: size(name) for name in specs}
    return LoadedSizes(
        sum(sizes.values()),
        max((size for name, size in sizes.items() if ".layers." in name), default=0),
        max(
            (spec.nbytes for name, spec in specs.items() if is_cast(name) and spec.dtype != dtype), default=0
        ),
    )


def _empty_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """The model without storage."""
    with torch.device("meta"):
        return Transformer(config, linear_factory(config), dtype)


def _modules(model: Transformer) -> dict[str, nn.Module]:
    """The modules that have tensors of their own, by their names in a checkpoint."""
    return {hugging_face_name(name): module for name, module in model.named_modules() if has_tensors(module)}


def linear_factory(config: ModelConfig) -> LinearFactory:
    """What makes the linears of a checkpoint with this configuration, each as the checkpoint stores it.

    But for those that come dense from `find_weights`: there they are dense.
    """
    if config.quantization is None:
        return dense_linear
    scheme_of = schemes_of(dict(config.quantization))

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        scheme = scheme_of(hugging_face_name(name))
        if scheme is None or isinstance(scheme, DenseAtLoad):
            return dense_linear(name, in_features, out_features)
        return scheme.linear(in_features, out_features)

    return linear


def has_tensors(module: nn.Module) -> bool:
    """Whether a module has tensors of its own, not only those of the modules in it."""
    return isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(recurse=False))


def expected_tensors(name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that a module needs, by full name, with their shapes; −1 is a length that varies."""
    if isinstance(module, QuantizedLinear):
        return {f"{name}.{suffix}": shape for suffix, shape in module.stored().items()}
    return {
        f"{name}.{key}": tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)
    }


def _all_expected(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {name: expected_tensors(name, module) for name, module in modules.items()}


def _check_tensors(
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    directory: object,
    modules: Mapping[str, nn.Module],
    by_module: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> None:
    """Every tensor that is needed is there, with its shape and of a type that we run, and none is left over."""
    expected = {name: shape for tensors in by_module.values() for name, shape in tensors.items()}
    _refuse("is missing", expected.keys() - specs.keys(), directory)
    spare = {name for name in specs.keys() - expected.keys() if not _IGNORED.match(name)}
    if config.tied_embeddings:
        spare -= {"lm_head.weight"}
    _refuse("does not belong to the model that its configuration describes", spare, directory)
    for name, shape in expected.items():
        _check_shape(name, specs[name].shape, shape, directory)
    for name, module in modules.items():
        dtype = None if isinstance(module, QuantizedLinear) else specs[f"{name}.weight"].dtype
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            raise MistralError(
                f"tensor {name}.weight is stored as {dtype}, which is not supported for dense weights"
            )


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...], directory: object) -> None:
    if found != shape and (  # they nearly always are: this is before the first byte is loaded
        len(found) != len(shape)
        or any(want not in (-1, have) for have, want in zip(found, shape, strict=True))
    ):
        raise IntegrityError(
            f"tensor {name} in {directory} has the shape {list(found)} "
            f"where the configuration asks for {list(shape)}",
            "configuration and weights are not of the same model: pull it again",
        )


def _refuse(what: str, names: set[str], directory: object) -> None:
    if names:
        first, rest = min(names), len(names) - 1
        more = f" (and {rest} more)" if rest else ""
        raise IntegrityError(
            f"tensor {first}{more} {what} in {directory}",
            "the checkpoint is incomplete or of another model",
        )


def _load_quantized(
    checkpoint: Checkpoint,
    name: str,
    module: QuantizedLinear,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
) -> None:
    try:
        module.load_stored({key: tensors[f"{name}.{key}"] for key in module.stored()}, device)
    except IntegrityError as error:
        raise IntegrityError(f"{name} in {checkpoint.directory}: {error.message}", error.hint) from error


def _parameter(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(tensor.to(device=device, dtype=dtype or tensor.dtype), requires_grad=False)
