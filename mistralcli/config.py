"""The shape of a model, read from a checkpoint directory: `config.json` (Hugging Face) or `params.json` (Mistral)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistralcli.errors import IntegrityError, MistralError, ModelNotFoundError
from mistralcli.quantization_config import of_hugging_face, of_mistral
from quant.files import open_tensors, read_json, weight_files

__all__ = ["MODEL_TYPES", "ModelConfig", "hugging_face_config", "read_config", "read_json"]

MODEL_TYPES = ("ministral", "mistral")
"""The `model_type`s of config.json that this program runs."""

_LARGEST_SIZE = 2**20
_MOST_LAYERS = 1024
"""What no model comes near: with larger values its shape alone would not fit in memory, or in 64 bits."""

_MINISTRAL_8B_SHAPE = (36, 4096, 12288, 131072, 32768)
_MINISTRAL_8B_WINDOWS = (None, 32768, 32768, 32768) * 9

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class ModelConfig:
    """A dense Mistral-family transformer. All sizes are counts of elements, `max_seq_len` of positions.

    `sliding_windows` has one entry per layer: how many positions a query sees, itself included, or None for
    all. `eos_ids` end a completion. `dtype` names the type that the checkpoint's dense tensors are stored in.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    sliding_windows: tuple[int | None, ...]
    tied_embeddings: bool
    eos_ids: tuple[int, ...]
    dtype: str
    quantization: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            _require(name, getattr(self, name), 1 <= getattr(self, name) <= _LARGEST_SIZE, "from 1 to 2^20")
        _require("max_seq_len", self.max_seq_len, self.max_seq_len >= 2, "2 or more")
        _require("rope_theta", self.rope_theta, 0 < self.rope_theta < math.inf, "above 0 and finite")
        _require("norm_eps", self.norm_eps, 0 <= self.norm_eps < math.inf, "0 or more and finite")
        if self.n_heads % self.n_kv_heads:
            raise IntegrityError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise IntegrityError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise IntegrityError(f"a sliding window must be at least 1: {self.sliding_windows}")


def _require(name: str, value: float, good: bool, what: str) -> None:
    if not good:
        raise IntegrityError(f"the configuration has {name} = {value}; it must be {what}")


def read_config(directory: Path) -> ModelConfig:
    """Read the configuration of the checkpoint in `directory`; `config.json` is preferred.

    Raises:
        ModelNotFoundError: the directory holds neither file.
        IntegrityError: the file is not JSON, or a needed value is missing or impossible.
        MistralError: the model is of a kind that this program does not run, which is named.
    """
    for name, parse in (("config.json", _from_hugging_face), ("params.json", _from_mistral)):
        path = directory / name
        if path.is_file():
            raw = read_json(path)
            try:
                return parse(raw, directory)
            except KeyError as error:
                raise IntegrityError(f"{path} has no value for {error.args[0]!r}") from error
            except (TypeError, ValueError, OverflowError) as error:
                raise IntegrityError(f"{path} has a value of the wrong kind: {error}") from error
    raise ModelNotFoundError(
        f"{directory} is not a model: it has neither config.json nor params.json",
        "name a directory that holds a checkpoint, or a model that `mistral list` shows",
    )


def _whole(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number; a null is as good as none. Raises KeyError where there is none and no default."""
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise KeyError(key)
    if type(value) is not int:
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise KeyError(key)
    if type(value) not in (int, float):
        raise ValueError(f"{key} is {value!r}, not a number")
    return float(value)


def _truth(raw: Mapping[str, Any], key: str) -> bool:
    """True or false; false where there is none."""
    value = raw.get(key) or False
    if type(value) is not bool:
        raise ValueError(f"{key} is {value!r}, not true or false")
    return value


def _object(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, not an object")
    return value


def _from_hugging_face(raw: dict[str, Any], directory: Path) -> ModelConfig:
    """Values that config.json leaves out are those of transformers' MistralConfig."""
    _refuse_unsupported(raw)
    dim, n_heads = _whole(raw, "hidden_size"), _whole(raw, "num_attention_heads")
    # A null means that every head has keys and values of its own.
    n_kv_heads = _whole(raw, "num_key_value_heads", n_heads if "num_key_value_heads" in raw else 8)
    return ModelConfig(
        dim=dim,
        n_layers=_whole(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=_whole(raw, "head_dim", dim // max(n_heads, 1)),
        hidden_dim=_whole(raw, "intermediate_size"),
        vocab_size=_whole(raw, "vocab_size"),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=_number(_object(raw, "rope_parameters"), "rope_theta", _number(raw, "rope_theta", 1e4)),
        max_seq_len=_whole(raw, "max_position_embeddings", 4096 * 32),
        sliding_windows=_windows_by_layer(raw),
        tied_embeddings=_truth(raw, "tie_word_embeddings"),
        eos_ids=_eos_ids(directory),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        quantization=of_hugging_face(_object(raw, "quantization_config"), directory),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    model_type = raw["model_type"]
    if not isinstance(model_type, str):
        raise ValueError(f"model_type is {model_type!r}, not a name")
    if model_type not in MODEL_TYPES:
        raise MistralError(
            f"models of type {model_type!r} are not supported",
            f"mistral runs {' and '.join(MODEL_TYPES)} models",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise MistralError(f"the activation {raw['hidden_act']!r} is not supported, only 'silu' (SwiGLU)")
    for rope in (_object(raw, "rope_scaling"), _object(raw, "rope_parameters")):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise MistralError(f"rotary scaling of type {kind!r} is not supported yet")


def _windows_by_layer(raw: dict[str, Any]) -> tuple[int | None, ...]:
    """One window per layer: uniform, or by `layer_types` (transformers' Ministral)."""
    n_layers = _n_layers(raw, "num_hidden_layers")
    shape = tuple(
        raw.get(key)
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "sliding_window")
    )
    if shape == _MINISTRAL_8B_SHAPE and "layer_types" not in raw:
        # Ministral-8B-2410's config.json states one uniform window; the model was trained with these.
        return _MINISTRAL_8B_WINDOWS
    window = _window(raw.get("sliding_window", 4096))
    kinds = raw.get("layer_types")
    if kinds is None:
        return (window,) * n_layers
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types is {kinds!r}, not a list")
    if len(kinds) != n_layers:
        raise IntegrityError(f"config.json has {len(kinds)} layer_types for {n_layers} layers")
    return tuple(_window_of_kind(kind, window) for kind in kinds)


def _window_of_kind(kind: Any, window: int | None) -> int | None:
    if kind not in ("sliding_attention", "full_attention"):
        raise MistralError(
            f"layers of type {kind!r} are not supported, only sliding_attention and full_attention"
        )
    return window if kind == "sliding_attention" else None


def _n_layers(raw: dict[str, Any], key: str) -> int:
    """The number of layers, checked before a list is made of that length."""
    n_layers = _whole(raw, key)
    _require(key, n_layers, 1 <= n_layers <= _MOST_LAYERS, f"from 1 to {_MOST_LAYERS}")
    return n_layers


def _window(value: Any) -> int | None:
    return None if value is None else _whole({"sliding_window": value}, "sliding_window")


def _eos_ids(directory: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json and config.json: one id, a list of ids or none in each."""
    ids: list[int] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int and one >= 0 for one in values):
            raise IntegrityError(f"{path} has an eos_token_id that is no token id: {value!r}")
        ids += values
    return tuple(dict.fromkeys(ids))


def _from_mistral(raw: dict[str, Any], directory: Path) -> ModelConfig:
    for key in ("moe", "vision_encoder", "yarn"):
        if raw.get(key):
            raise MistralError(f"params.json of {directory.name} asks for {key!r}, which is not supported")
    dim, n_heads = _whole(raw, "dim"), _whole(raw, "n_heads")
    window = raw.get("sliding_window", raw.get("_sliding_window"))
    return ModelConfig(
        dim=dim,
        n_layers=_whole(raw, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=_whole(raw, "n_kv_heads", n_heads),
        head_dim=_whole(raw, "head_dim", dim // max(n_heads, 1)),
        hidden_dim=_whole(raw, "hidden_dim"),
        vocab_size=_whole(raw, "vocab_size"),
        norm_eps=_number(raw, "norm_eps"),
        # FACTS: a missing theta means 1e6 without a window and 1e4 with one.
        rope_theta=_number(raw, "rope_theta", 1e4 if window else 1e6),
        max_seq_len=_whole(raw, "max_position_embeddings", _whole(raw, "max_seq_len", 32768)),
        sliding_windows=_repeat_windows(window, _n_layers(raw, "n_layers")),
        tied_embeddings=_truth(raw, "tied_embeddings"),
        eos_ids=_eos_ids(directory),
        dtype=_stored_dtype(directory),
        quantization=of_mistral(_object(raw, "quantization")),
    )


def _repeat_windows(window: Any, n_layers: int) -> tuple[int | None, ...]:
    """params.json states one window for all layers, or a pattern that repeats over them."""
    pattern = window if isinstance(window, list) else [window]
    if not pattern or n_layers % len(pattern):
        raise IntegrityError(f"params.json's sliding_window has {len(pattern)} entries for {n_layers} layers")
    return tuple(_window(one) for one in pattern) * (n_layers // len(pattern))


def _stored_dtype(directory: Path) -> str:
    """The type of the weights, which params.json does not state: that of the last norm, or of the first tensor."""
    for name in weight_files(directory, "consolidated"):
        if (directory / name).is_file():
            with open_tensors(directory / name) as file:
                names = set(file.keys())
                norm_or_first = "norm.weight" if "norm.weight" in names else min(names)
                code: str = file.get_slice(norm_or_first).get_dtype()
            return _DTYPE_NAMES.get(code, code)
    return "bfloat16"


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that states `config`, for a checkpoint that came with `params.json` alone.

    Of a quantized one it has the `quantization_config` too.

    Raises:
        MistralError: its layers have windows of different lengths, which config.json cannot state.
    """
    windows = {window for window in config.sliding_windows if window is not None}
    if len(windows) > 1:
        raise MistralError(
            f"config.json cannot state layers with different windows: {config.sliding_windows}"
        )
    by_layer = {}
    if windows and None in config.sliding_windows:
        kinds = [
            "full_attention" if window is None else "sliding_attention" for window in config.sliding_windows
        ]
        by_layer = {"layer_types": kinds}
    return {
        "architectures": ["MinistralForCausalLM" if by_layer else "MistralForCausalLM"],
        "model_type": "ministral" if by_layer else "mistral",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_seq_len,
        "sliding_window": max(windows, default=None),
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": config.dtype,
        **by_layer,
        **({"quantization_config": dict(config.quantization)} if config.quantization else {}),
    }
