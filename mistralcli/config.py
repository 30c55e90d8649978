"""The shape of a model, read from a checkpoint directory: `config.json` (Hugging Face) or `params.json` (Mistral)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistralcli.errors import IntegrityError, MistralError, ModelNotFoundError

MODEL_TYPES = frozenset({"mistral", "ministral"})
"""The `model_type`s of config.json that this program runs."""

_MINISTRAL_8B_SHAPE = (36, 4096, 12288, 131072, 32768)
_MINISTRAL_8B_WINDOWS = (None, 32768, 32768, 32768) * 9


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
            if getattr(self, name) < 1:
                raise IntegrityError(
                    f"the configuration has {name} = {getattr(self, name)}; it must be positive"
                )
        if self.n_heads % self.n_kv_heads:
            raise IntegrityError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise IntegrityError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise IntegrityError(f"a sliding window must be at least 1: {self.sliding_windows}")


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
            except (TypeError, ValueError) as error:
                raise IntegrityError(f"{path} has a value of the wrong kind: {error}") from error
    raise ModelNotFoundError(
        f"{directory} is not a model: it has neither config.json nor params.json",
        "name a directory that holds a checkpoint, or a model that `mistral list` shows",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or IntegrityError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read as JSON: {error}", "pull the model again") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _from_hugging_face(raw: dict[str, Any], directory: Path) -> ModelConfig:
    """Values that config.json leaves out are those of transformers' MistralConfig."""
    _refuse_unsupported(raw)
    n_layers, n_heads, dim = (
        int(raw["num_hidden_layers"]),
        int(raw["num_attention_heads"]),
        int(raw["hidden_size"]),
    )
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(raw.get("num_key_value_heads", 8) or n_heads),
        head_dim=int(raw.get("head_dim") or dim // n_heads),
        hidden_dim=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(raw),
        max_seq_len=int(raw.get("max_position_embeddings", 4096 * 32)),
        sliding_windows=_windows_by_layer(raw, n_layers),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_ids=_eos_ids(raw, directory),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        quantization=raw.get("quantization_config"),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise MistralError(
            f"models of type {model_type!r} are not supported",
            f"mistral runs {' and '.join(sorted(MODEL_TYPES))} models",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise MistralError(f"the activation {raw['hidden_act']!r} is not supported, only 'silu' (SwiGLU)")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise MistralError(f"rotary scaling of type {kind!r} is not supported yet")


def _rope_theta(raw: dict[str, Any]) -> float:
    parameters = raw.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0)


def _windows_by_layer(raw: dict[str, Any], n_layers: int) -> tuple[int | None, ...]:
    """One window per layer: uniform, or by `layer_types` (transformers' Ministral)."""
    window = raw.get("sliding_window", 4096)
    shape = tuple(
        raw.get(key)
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "sliding_window")
    )
    if shape == _MINISTRAL_8B_SHAPE and "layer_types" not in raw:
        # Ministral-8B-2410's config.json states one uniform window; the model was trained with these.
        return _MINISTRAL_8B_WINDOWS
    kinds = raw.get("layer_types") or ["full_attention" if window is None else "sliding_attention"] * n_layers
    if len(kinds) != n_layers:
        raise IntegrityError(f"config.json has {len(kinds)} layer_types for {n_layers} layers")
    return tuple(
        int(window) if kind == "sliding_attention" and window is not None else None for kind in kinds
    )


def _eos_ids(raw: dict[str, Any], directory: Path) -> tuple[int, ...]:
    """The end-of-sequence ids: generation_config.json's when it has any (it may list more), else config.json's."""
    generation = directory / "generation_config.json"
    value = read_json(generation).get("eos_token_id") if generation.is_file() else None
    value = raw.get("eos_token_id") if value is None else value
    if value is None:
        return ()
    return tuple(int(one) for one in value) if isinstance(value, list) else (int(value),)


def _from_mistral(raw: dict[str, Any], directory: Path) -> ModelConfig:
    for key in ("moe", "vision_encoder", "yarn", "quantization"):
        if raw.get(key):
            raise MistralError(f"params.json of {directory.name} asks for {key!r}, which is not supported")
    dim, n_layers, n_heads = int(raw["dim"]), int(raw["n_layers"]), int(raw["n_heads"])
    window = raw.get("sliding_window", raw.get("_sliding_window"))
    # FACTS: a missing theta means 1e6 without a window and 1e4 with one.
    theta = raw.get("rope_theta") or (1e4 if window else 1e6)
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(raw.get("n_kv_heads") or n_heads),
        head_dim=int(raw.get("head_dim") or dim // n_heads),
        hidden_dim=int(raw["hidden_dim"]),
        vocab_size=int(raw["vocab_size"]),
        norm_eps=float(raw["norm_eps"]),
        rope_theta=float(theta),
        max_seq_len=int(raw.get("max_position_embeddings") or raw.get("max_seq_len") or 32768),
        sliding_windows=_repeat_windows(window, n_layers),
        tied_embeddings=bool(raw.get("tied_embeddings", False)),
        eos_ids=(),
        dtype="bfloat16",
    )


def _repeat_windows(window: int | list[int | None] | None, n_layers: int) -> tuple[int | None, ...]:
    """params.json states one window for all layers, or a pattern that repeats over them."""
    pattern = window if isinstance(window, list) else [window]
    if not pattern or n_layers % len(pattern):
        raise IntegrityError(f"params.json's sliding_window has {len(pattern)} entries for {n_layers} layers")
    return tuple(None if one is None else int(one) for one in pattern) * (n_layers // len(pattern))


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that states `config`, for a checkpoint that came with `params.json` alone."""
    windows = set(config.sliding_windows)
    by_layer = {}
    if len(windows) > 1:
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
        "sliding_window": max((window for window in windows if window is not None), default=None),
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": config.dtype,
        **by_layer,
    }
