"""A linear layer whose weight is quantized; each scheme has its own subclass beside it in `quant.schemes`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn


class QuantizedLinear(nn.Module, ABC):
    """`y = x wᵀ`, without bias: (..., in_features) to (..., out_features) in x's dtype.

    It is made without a weight; `load_stored` gives it one. Nothing in it is trained.
    """

    kept: frozenset[str] = frozenset()
    """Which of `stored` a layer holds as they are, on a GPU: so they may share memory there with those of others."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def stored(self) -> dict[str, tuple[int, ...]]:
        """What a checkpoint holds under `<module>.<suffix>`, suffix to shape; −1 is a length that varies."""

    @abstractmethod
    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Take the tensors that `stored` names; on the CPU they may stay memory-mapped.

        Raises:
            IntegrityError: a tensor's dtype or content contradicts the scheme or the layer's shape.
        """

    def prepare(self) -> None:
        """Rearrange the weight, once it is loaded, for the kernels of its device, in place of what was stored.

        Kernels may round activations; a layer that was not prepared computes with them as they are.
        """

    def load_kernels(self) -> None:
        """Compile or load the kernels that a product takes, so that the first takes no longer than others."""

    @abstractmethod
    def dense_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the dequantized weight, (stop − start, in_features) float32."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
