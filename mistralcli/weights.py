"""Weights from disk to a model: Hugging Face's layout or Mistral's own, one tensor at a time.

On the CPU they are memory-mapped; to a GPU they go through pinned memory (`staged_reading`).
"""

import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mistralcli.config import ModelConfig, read_config
from mistralcli.errors import IntegrityError, MistralError, ModelNotFoundError
from mistralcli.model import Embedding, LinearFactory, Transformer, dense_linear
from mistralcli.staged_reading import TensorPlace, data_offsets, read_to_device, unreadable
from quant.files import STEMS, open_tensors, weight_files
from quant.linear import QuantizedLinear
from quant.scheme import schemes_of
from quant.tensors import TensorSpec

OnProgress = Callable[[int, int], None]
"""Called with the bytes loaded so far and in all."""

_TOP_LEVEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BULK = (".weight", ".weight_packed", ".weight_scale", ".weight_zero_point")
"""The last parts of names of tensors that are read straight to a GPU; schemes look into the others on the CPU."""

_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq$")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def hugging_face_name(module: str) -> str:
    """The name in a Hugging Face checkpoint of a module of `Transformer`."""
    if module in _TOP_LEVEL:
        return _TOP_LEVEL[module]
    _, index, rest = module.split(".", 2)
    return f"model.layers.{index}.{_IN_LAYER[rest]}"


class Checkpoint:
    """The tensors of a checkpoint directory by their Hugging Face names, whatever its layout.

    Files are memory-mapped when a tensor of theirs is first asked for. Mistral's own layout pairs neighbouring
    rows of wq and wk for the rotary embedding; here they come in Hugging Face's rotate-half order.
    """

    def __init__(self, directory: Path, files: Mapping[str, Path], stored_names: Mapping[str, str]) -> None:
        self.directory = directory
        self._files = dict(files)
        self._stored_names = dict(stored_names)
        self._open: dict[Path, safe_open] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        self._rotary_heads = _rotary_heads(directory) if stored_names else {}

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def files(self) -> Sequence[Path]:
        """The files that hold the weights, sorted."""
        return sorted(set(self._files.values()))

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, from the file's header."""
        try:
            view = self._handle(name).get_slice(self._stored_names.get(name, name))
        except (SafetensorError, OSError) as error:
            raise unreadable(self._files[name], name, error) from error
        code = view.get_dtype()
        if code not in _DTYPES:
            raise IntegrityError(f"tensor {name} in {self._files[name]} has the unknown type {code}")
        return TensorSpec(tuple(view.get_shape()), _DTYPES[code])

    def load(self, name: str) -> torch.Tensor:
        """One tensor; it aliases the memory-mapped file unless its rows had to be reordered."""
        try:
            tensor: torch.Tensor = self._handle(name).get_tensor(self._stored_names.get(name, name))
        except (SafetensorError, OSError) as error:
            raise unreadable(self._files[name], name, error) from error
        return self._in_order(name, tensor)

    def load_to(self, device: torch.device, names: Sequence[str]) -> Generator[torch.Tensor, None, None]:
        """Several tensors on a GPU, in that order, read ahead of being asked for."""
        places = [self._place(name) for name in names]
        with closing(read_to_device(places, device)) as tensors:
            yield from map(self._in_order, names, tensors)  # which holds none of them

    def release(self) -> None:
        """Unmap the files, but for tensors that are still held: pages that were read count as resident memory."""
        self._open.clear()

    def _handle(self, name: str) -> safe_open:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = open_tensors(path)
        return self._open[path]

    def _place(self, name: str) -> TensorPlace:
        path = self._files[name]
        if path not in self._offsets:
            self._offsets[path] = data_offsets(path)
        start = self._offsets[path][self._stored_names.get(name, name)]
        return TensorPlace(name, path, start, self.spec(name))

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        n_heads = self._rotary_heads.get(name.split(".")[-2]) if name.endswith(".weight") else None
        return tensor if n_heads is None else _rotate_half_order(tensor, n_heads)


def _rotary_heads(directory: Path) -> dict[str, int]:
    config = read_config(directory)
    return {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}


def _rotate_half_order(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of wq or wk from interleaved pairs (2i, 2i + 1) to rotate-half pairs (i, i + head_dim / 2)."""
    out_features, in_features = weight.shape
    pairs = weight.view(n_heads, out_features // n_heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def open_checkpoint(directory: Path) -> Checkpoint:
    """The weights in `directory`, their names, shapes and types checked against its configuration by headers alone.

    Raises:
        ModelNotFoundError: there are none.
        IntegrityError: a tensor is missing, extra or mis-shaped, or a file is damaged or missing; it is named.
        MistralError: the quantization, or the type of a tensor, is of a kind that is not supported; it is named.
    """
    checkpoint, config = _find_weights(directory), read_config(directory)
    _check_tensors(config, checkpoint, _modules(_empty_model(config, torch.float32)))
    return checkpoint


def _find_weights(directory: Path) -> Checkpoint:
    """Hugging Face's files if there are any, else `consolidated*.safetensors`."""
    for stem in STEMS:
        files = _tensor_files(directory, stem)
        if files:
            if stem == "model":
                return Checkpoint(directory, files, {})
            stored = {_translated(name): name for name in files}
            return Checkpoint(directory, {hf: files[name] for hf, name in stored.items()}, stored)
    raise ModelNotFoundError(
        f"{directory} has no weights: neither model*.safetensors nor consolidated*.safetensors",
        "pull the model again, or name another directory",
    )


def _tensor_files(directory: Path, stem: str) -> dict[str, Path]:
    """Tensor name to file, by the headers of the files."""
    names = weight_files(directory, stem)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise IntegrityError(f"{directory} lacks the shard {missing[0]}", "pull the model again")
    paths = [directory / name for name in names]
    return {name: path for path in paths for name in list(open_tensors(path).keys())}


def _translated(name: str) -> str:
    """Mistral's tensor name as Hugging Face's; a name of neither stays and is later reported as extra."""
    module, _, suffix = name.rpartition(".")
    try:
        return f"{hugging_face_name(module)}.{suffix}"
    except (KeyError, ValueError):
        return name


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
    one tensor. An untied embedding stays in the type it is stored in: only the rows that are looked up are cast.

    Raises:
        IntegrityError: a tensor is missing, extra or mis-shaped, or a file is damaged; it is named.
        MistralError: the quantization is of a kind that is not supported; it is named.
    """
    config = read_config(directory)
    checkpoint = _find_weights(directory)
    model = _empty_model(config, dtype)
    modules = _modules(model)
    _check_tensors(config, checkpoint, modules)
    sizes = {name: _module_bytes(checkpoint, name, module) for name, module in modules.items()}
    done = 0
    needed = [list(_expected(name, module)) for name, module in modules.items()]
    with closing((_staged if device.type == "cuda" else _mapped)(checkpoint, needed, device)) as loading:
        for (name, module), tensors in zip(modules.items(), loading, strict=True):
            if isinstance(module, QuantizedLinear):
                _load_quantized(checkpoint, name, module, tensors, device)
                if not exact:
                    module.prepare()
            else:
                keep = isinstance(module, Embedding) and not config.tied_embeddings
                module.weight = _parameter(tensors[f"{name}.weight"], device, None if keep else dtype)
            tensors.clear()  # before more is loaded
            done += sizes[name]
            if on_progress is not None:
                on_progress(done, sum(sizes.values()))
    return model.eval().requires_grad_(False)


def load_kernels(model: Transformer) -> None:
    """Get the kernels of quantized layers before a prompt needs them: compiled, or loaded from where they are kept."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.load_kernels()


def _mapped(
    checkpoint: Checkpoint, needed: Iterable[Sequence[str]], device: torch.device
) -> Generator[dict[str, torch.Tensor], None, None]:
    """The tensors of module after module, each set memory-mapped until the next is asked for."""
    for names in needed:
        yield {name: checkpoint.load(name) for name in names}
        checkpoint.release()


def _staged(
    checkpoint: Checkpoint, needed: Sequence[Sequence[str]], device: torch.device
) -> Generator[dict[str, torch.Tensor], None, None]:
    """The same with the bulk of them on `device` already."""

    def is_bulk(name: str) -> bool:
        return name.endswith(_BULK)

    bulk = [name for names in needed for name in names if is_bulk(name)]
    with closing(checkpoint.load_to(device, bulk)) as arriving:
        for names in needed:
            yield {name: next(arriving) if is_bulk(name) else checkpoint.load(name) for name in names}


@dataclass(frozen=True)
class LoadedSizes:
    """Bytes of all weights once loaded, of a layer's largest tensor, and of the largest that is cast, as stored."""

    total: int
    largest_in_layer: int
    largest_cast: int


def loaded_sizes(directory: Path, dtype: torch.dtype) -> LoadedSizes:
    """What the weights in `directory` take to compute in `dtype`; reads headers only."""
    config = read_config(directory)
    checkpoint = _find_weights(directory)
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}

    def is_cast(name: str) -> bool:
        kept = name == "model.embed_tokens.weight" and not config.tied_embeddings
        return name.endswith(".weight") and specs[name].dtype.is_floating_point and not kept

    def size(name: str) -> int:
        spec = specs[name]
        if name.endswith(".weight_zero_point"):  # one int8 for each scale
            return math.prod(specs[name.replace("zero_point", "scale")].shape)
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
        return Transformer(config, _linear_factory(config), dtype)


def _modules(model: Transformer) -> dict[str, nn.Module]:
    """The modules that have tensors of their own, by their names in a checkpoint."""
    return {hugging_face_name(name): module for name, module in model.named_modules() if _has_tensors(module)}


def _linear_factory(config: ModelConfig) -> LinearFactory:
    if config.quantization is None:
        return dense_linear
    scheme_of = schemes_of(dict(config.quantization))

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        scheme = scheme_of(hugging_face_name(name))
        if scheme is None:
            return dense_linear(name, in_features, out_features)
        return scheme.linear(in_features, out_features)

    return linear


def _has_tensors(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(recurse=False))


def _expected(name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that a module needs, by full name, with their shapes; −1 is a length that varies."""
    if isinstance(module, QuantizedLinear):
        return {f"{name}.{suffix}": shape for suffix, shape in module.stored().items()}
    return {
        f"{name}.{key}": tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)
    }


def _check_tensors(config: ModelConfig, checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> None:
    """Every tensor that is needed is there, with its shape and of a type that we run, and none is left over."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        expected |= _expected(name, module)
    present = set(checkpoint.names())
    _refuse("is missing", expected.keys() - present, checkpoint)
    spare = {name for name in present - expected.keys() if not _IGNORED.match(name)}
    if config.tied_embeddings:
        spare -= {"lm_head.weight"}
    _refuse("does not belong to the model that its configuration describes", spare, checkpoint)
    for name, shape in expected.items():
        _check_shape(checkpoint, name, shape)
    for name, module in modules.items():
        dtype = None if isinstance(module, QuantizedLinear) else checkpoint.spec(f"{name}.weight").dtype
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            raise MistralError(
                f"tensor {name}.weight is stored as {dtype}, which is not supported for dense weights"
            )


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    found = checkpoint.spec(name).shape
    if len(found) != len(shape) or any(
        want not in (-1, have) for have, want in zip(found, shape, strict=True)
    ):
        raise IntegrityError(
            f"tensor {name} in {checkpoint.directory} has the shape {list(found)} "
            f"where the configuration asks for {list(shape)}",
            "configuration and weights are not of the same model: pull it again",
        )


def _refuse(what: str, names: set[str], checkpoint: Checkpoint) -> None:
    if names:
        first, rest = min(names), len(names) - 1
        more = f" (and {rest} more)" if rest else ""
        raise IntegrityError(
            f"tensor {first}{more} {what} in {checkpoint.directory}",
            "the checkpoint is incomplete or of another model",
        )


def _module_bytes(checkpoint: Checkpoint, name: str, module: nn.Module) -> int:
    specs = (checkpoint.spec(full) for full in _expected(name, module))
    return sum(spec.nbytes for spec in specs)


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
