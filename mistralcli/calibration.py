"""A model's hidden states on a text, one layer after the other: what methods with data look at (`quant.method`)."""

import errno
import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mistralcli.errors import IntegrityError
from mistralcli.layerwise import LayerwiseModel
from quant.memory import BATCH_TOKENS
from quant.method import Compare, Observe


class LayerwiseCalibration:
    """The hidden states of a model on `token_ids` (n_seqs, n_tokens), before the layer that comes next.

    They take n_seqs · n_tokens · dim · the size of the model's dtype, on its device, beside one layer in that dtype
    and the activations of `BATCH_TOKENS` tokens (or of one sequence, if that is longer). All of it twice for a method
    that compares: the exact hidden states are kept beside those of the layers as they are stored.
    """

    def __init__(self, model: LayerwiseModel, token_ids: torch.Tensor, text: str) -> None:
        """`text` is the name of what the ids are from."""
        n_seqs, n_tokens = token_ids.shape
        self.description: Mapping[str, Any] = {
            "text": text,
            "sha256": hashlib.sha256(token_ids.to(torch.int64).numpy().tobytes()).hexdigest(),
            "n_seqs": n_seqs,
            "n_tokens": n_tokens,
        }
        self.head_dim = model.config.head_dim
        self._model = model
        self._hidden = model.embed(token_ids)  # (n_seqs, n_tokens, dim)
        self._exact: torch.Tensor | None = None  # where it differs
        self._n_batch = max(1, BATCH_TOKENS // n_tokens)

    @torch.no_grad()
    def run(
        self, index: int, weights: Mapping[str, torch.Tensor], names: Collection[str], observe: Observe
    ) -> None:
        """Let `observe` see what the linears of `names` are given in layer `index` with these weights."""
        inputs = self._watched(index, weights, names)
        for hidden in self._hidden.split(self._n_batch):
            for name, x in inputs(hidden).items():
                observe(name, x)

    @torch.no_grad()
    def compare(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        exact: Mapping[str, torch.Tensor],
        names: Collection[str],
        observe: Compare,
    ) -> None:
        """Let `observe` see what modules are given in layer `index` with these weights, and in the exact model."""
        inputs, exact_inputs = (self._watched(index, each, names) for each in (weights, exact))
        states = self._hidden if self._exact is None else self._exact
        for hidden, exact_hidden in zip(
            self._hidden.split(self._n_batch), states.split(self._n_batch), strict=True
        ):
            observe(inputs(hidden), exact_inputs(exact_hidden))

    @torch.no_grad()
    def advance_exact(self, index: int, exact: Mapping[str, torch.Tensor]) -> None:
        """Let the exact hidden states be the output of layer `index` with its weights `exact`."""
        if self._exact is None:
            self._exact = self._hidden.clone()
        self._advance(self._exact, index, exact)

    @torch.no_grad()
    def advance(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Let the hidden states be the output of layer `index` with these weights."""
        self._advance(self._hidden, index, weights)

    def _advance(self, states: torch.Tensor, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        layer = self._model.layer_from(index, weights)
        for hidden in states.split(self._n_batch):
            hidden.copy_(self._model.run_layer(layer, hidden))

    def _watched(
        self, index: int, weights: Mapping[str, torch.Tensor], names: Collection[str]
    ) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """From hidden states before layer `index` to what the modules of `names` are given in it, by name.

        What follows the last of them is not computed.
        """
        layer = self._model.layer_from(index, weights)
        seen: dict[str, torch.Tensor] = {}
        for name, module in layer.tensor_modules().items():
            if f"{name}.weight" in names:
                module.register_forward_pre_hook(partial(_see, f"{name}.weight", seen, len(names)))

        def inputs(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.clear()
            with suppress(_SeenAllError):
                self._model.run_layer(layer, hidden)
            return dict(seen)

        return inputs

    def save(self, path: Path) -> None:
        """Write the hidden states, bit for bit, in safetensors' format. Raises OSError where they cannot be written."""
        try:
            save_file(self._states(), path, metadata={"sha256": self.description["sha256"]})
        except SafetensorError as error:  # which says what the system said, in words only
            raise OSError(errno.EIO, str(error), str(path)) from error

    def restore(self, path: Path) -> None:
        """Take the hidden states that `save` wrote for the same text and model."""
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("sha256")
            states = load_file(path)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}", "start the build afresh") from error
        hidden, mine = states["hidden"], self._hidden
        if text != self.description["sha256"] or (hidden.shape, hidden.dtype) != (mine.shape, mine.dtype):
            raise IntegrityError(
                f"{path} holds the hidden states of another text or model",
                "start the build afresh, or name the text it was begun with",
            )
        self._hidden.copy_(hidden)
        self._exact = states["exact"].to(mine.device, copy=True) if "exact" in states else None

    def _states(self) -> dict[str, torch.Tensor]:
        return {"hidden": self._hidden} | ({} if self._exact is None else {"exact": self._exact})


class _SeenAllError(Exception):
    """All that was to be observed of a batch has been; the rest of the layer need not be computed."""


def _see(
    name: str, seen: dict[str, torch.Tensor], n_names: int, module: nn.Module, args: tuple[torch.Tensor]
) -> None:
    """A hook in front of a module, called with its input (n_seqs, n_tokens, in_features)."""
    seen[name] = args[0].flatten(0, 1)
    if len(seen) == n_names:
        raise _SeenAllError
