"""The tensors of a checkpoint's files by their Hugging Face names, in Hugging Face's layout or Mistral's own."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mistralcli.config import ModelConfig, read_config
from mistralcli.dense_weights import DenseWeight, SeenTensors, seen_tensors
from mistralcli.errors import IntegrityError, MistralError, ModelNotFoundError
from mistralcli.staged_reading import Staging, TensorPlace, data_offsets, unreadable
from quant.files import STEMS, file_hash, fingerprint, open_tensors, weight_files
from quant.schemes.fp8 import SCALE
from quant.tensors import TensorSpec

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
_FP8_SUFFIXES = {"qscale_weight": SCALE, "qscale_act": "activation_scale", "scale": SCALE}
"""Mistral's own names of FP8's scales and a shorter one that some copies have, to those of `quant.schemes.fp8`."""

DTYPES = {
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
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The types of tensors by their names in a safetensors file."""


def hugging_face_name(module: str) -> str:
    """The name in a Hugging Face checkpoint of a module of `Transformer`."""
    if module in _TOP_LEVEL:
        return _TOP_LEVEL[module]
    _, index, rest = module.split(".", 2)
    return f"model.layers.{index}.{_IN_LAYER[rest]}"


class Checkpoint:
    """The tensors of a checkpoint directory by their Hugging Face names, whatever its layout.

    Files are memory-mapped when a tensor of theirs is first asked for. Mistral's own layout pairs neighbouring
    rows of wq and wk for the rotary embedding; here they come in Hugging Face's rotate-half order. Weights that a model
    holds dense come dense, whatever they are stored in (`dense_weights`), and their parts not at all.
    """

    def __init__(self, directory: Path, files: Mapping[str, Path], stored_names: Mapping[str, str]) -> None:
        """stored_names: in the files, by Hugging Face name, where they differ. It sees what is stored as it is."""
        self.directory = directory
        self._files = dict(files)
        self._stored_names = dict(stored_names)
        self._open: dict[Path, safe_open] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._rotary_heads: Mapping[str, int] = {}
        self._seen: SeenTensors | None = None

    def see_as(self, config: ModelConfig, *, pairs_neighbours: bool) -> None:
        """Show the tensors as the model of this configuration takes them.

        pairs_neighbours: whether rows of wq and wk come in Mistral's own order.

        Raises:
            IntegrityError, MistralError: as `seen_tensors`; and a layer has a bias, which we don't compute with.
        """
        if pairs_neighbours:
            self._rotary_heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
        stored = {name: self._stored_spec(name) for name in sorted(self._files)}
        self._seen = seen_tensors(stored, config, self.directory)
        for name in self._seen.zeros:
            if self._load_stored(name).any():
                raise MistralError(f"tensor {name} in {self.directory} is a bias, which is not supported")

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._files if self._seen is None else self._seen.specs)

    def files(self) -> Sequence[Path]:
        """The files that hold the weights, sorted."""
        return sorted(set(self._files.values()))

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Size, time and header of each file of weights, by its name."""
        return {file.name: fingerprint(file) for file in self.files()}

    def hash_bytes(self) -> int:
        """The size of all of the files."""
        return sum(file.stat().st_size for file in self.files())

    def hashes(self, on_read: Callable[[int], None]) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file of weights, by its name."""
        return {file.name: file_hash(file, on_read) for file in self.files()}

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, from the headers of its files."""
        return self._stored_spec(name) if self._seen is None else self._seen.specs[name]

    def load(self, name: str) -> torch.Tensor:
        """One tensor; it aliases the memory-mapped file unless it had to be reordered, or made dense."""
        if name in self._dense:
            return self._dense[name].made_of(map(self._load_stored, self._dense[name].parts))
        return self._load_stored(name)

    def position(self, name: str) -> tuple[Path, int]:
        """The file and the byte where a tensor begins, or the first of those that it is made of."""
        return self._start(self._parts(name)[0])

    def staging(self, names: Sequence[str], device: torch.device) -> Staging:
        """Begin to read several tensors ahead, for `staged`."""
        return Staging([self._place(part) for name in names for part in self._parts(name)], device)

    def staged(
        self, staging: Staging, names: Sequence[str], kept: Collection[str], on_host: Collection[str]
    ) -> Iterator[torch.Tensor]:
        """Those tensors in that order; those that are kept as they are stored may share memory.

        They are on the staging's device, but for those `on_host`.
        """
        as_stored = {name for name in kept if name not in self._dense and self._n_rotary_heads(name) is None}
        stored_names = [part for name in names for part in self._parts(name)]
        stored_on_host = {part for name in on_host for part in self._parts(name)}
        tensors = staging.tensors(as_stored, stored_on_host)
        arriving = map(self._in_order, stored_names, tensors)  # which holds none of them
        for name in names:
            if name in self._dense:
                yield self._dense[name].made_of(islice(arriving, len(self._parts(name))))
            else:
                yield next(arriving)

    def release(self) -> None:
        """Unmap the files, but for tensors that are still held: pages that were read count as resident memory."""
        self._open.clear()

    @property
    def largest_parts_bytes(self) -> int:
        """Of what any one weight is made of that comes dense."""
        return max((weight.parts_bytes for weight in self._dense.values()), default=0)

    def _parts(self, name: str) -> Sequence[str]:
        """The stored tensors that make a tensor."""
        return self._dense[name].parts if name in self._dense else (name,)

    @property
    def _dense(self) -> Mapping[str, DenseWeight]:
        return {} if self._seen is None else self._seen.dense

    def _stored_spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            self._specs[name] = self._read_spec(name)
        return self._specs[name]

    def _read_spec(self, name: str) -> TensorSpec:
        try:
            view = self._handle(name).get_slice(self._stored_names.get(name, name))
        except (SafetensorError, OSError) as error:
            raise unreadable(self._files[name], name, error) from error
        code = view.get_dtype()
        if code not in DTYPES:
            raise IntegrityError(f"tensor {name} in {self._files[name]} has the unknown type {code}")
        return TensorSpec(tuple(view.get_shape()), DTYPES[code])

    def _load_stored(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._handle(name).get_tensor(self._stored_names.get(name, name))
        except (SafetensorError, OSError) as error:
            raise unreadable(self._files[name], name, error) from error
        return self._in_order(name, tensor)

    def _handle(self, name: str) -> safe_open:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = open_tensors(path)
        return self._open[path]

    def _place(self, name: str) -> TensorPlace:
        return TensorPlace(name, *self._start(name), self._stored_spec(name))

    def _start(self, name: str) -> tuple[Path, int]:
        """The file and the byte where a stored tensor begins."""
        path = self._files[name]
        if path not in self._offsets:
            self._offsets[path] = data_offsets(path)
        return path, self._offsets[path][self._stored_names.get(name, name)]

    def _n_rotary_heads(self, name: str) -> int | None:
        """How many heads a weight has whose rows are stored in another order than we compute with."""
        return self._rotary_heads.get(name.split(".")[-2]) if name.endswith(".weight") else None

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        n_heads = self._n_rotary_heads(name)
        return tensor if n_heads is None else rotate_half_order(tensor, n_heads)


def rotate_half_order(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of wq or wk from interleaved pairs (2i, 2i + 1) to rotate-half pairs (i, i + head_dim / 2)."""
    out_features, in_features = weight.shape
    pairs = weight.view(n_heads, out_features // n_heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def find_weights(directory: Path) -> Checkpoint:
    """Hugging Face's files if there are any, else `consolidated*.safetensors`, as the model there takes them.

    Raises:
        ModelNotFoundError: there are none.
        IntegrityError, MistralError: as `read_config` and `Checkpoint.see_as`.
    """
    for stem in STEMS:
        files = _tensor_files(directory, stem)
        if files:
            config, is_own = read_config(directory), stem == "consolidated"
            stored = {translated_name(name) if is_own else _by_one_name(name, config): name for name in files}
            checkpoint = Checkpoint(directory, {hf: files[name] for hf, name in stored.items()}, stored)
            checkpoint.see_as(config, pairs_neighbours=is_own)
            return checkpoint
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


def translated_name(name: str) -> str:
    """Mistral's tensor name as Hugging Face's; a name of neither stays and is later reported as extra."""
    module, _, suffix = name.rpartition(".")
    try:
        return f"{hugging_face_name(module)}.{_FP8_SUFFIXES.get(suffix, suffix)}"
    except (KeyError, ValueError):
        return name


def _by_one_name(name: str, config: ModelConfig) -> str:
    """A tensor's name in Hugging Face's layout, where FP8's scales go by several."""
    module, _, suffix = name.rpartition(".")
    is_fp8 = config.quantization is not None and config.quantization.get("quant_method") == "fp8"
    return f"{module}.{_FP8_SUFFIXES[suffix]}" if is_fp8 and suffix in _FP8_SUFFIXES else name
