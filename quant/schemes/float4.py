"""nf4 and fp4 (Dettmers et al. 2023, "QLoRA"): 16 values, scaled by block.

`w = value[code] · absmax[block]`, where a block is 64 weights and may cross from one row into the next.
Stored and computed by bitsandbytes: docs/format.md has the tensors.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quant.errors import IntegrityError
from quant.linear import QuantizedLinear
from quant.method import Rounding
from quant.methods.rtn import round_to_nearest
from quant.schemes.bnb import bitsandbytes
from quant.tensors import TensorSpec
from quant.tiles import map_tiles

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
TILE_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Float4:
    """`quant_type`: nf4 or fp4. `nested`: absmax is itself quantized ("double quant"). `storage`: the type that the
    bytes of the codes are stored as. Other than the defaults these two are read, not written.
    """

    quant_type: str = "nf4"
    nested: bool = False
    storage: torch.dtype = torch.uint8

    @property
    def name(self) -> str:
        return self.quant_type

    @property
    def max_error(self) -> float:
        """The relative error that a sound weight stays below: 0.08–0.10 is usual."""
        return 0.30

    @property
    def state_suffix(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.quant_type}"

    def for_in_features(self, in_features: int) -> "Float4":
        return self

    def specs(self, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The stored tensors of a weight (out_features, in_features) of a model in `dtype`, by suffix."""
        n_weights = out_features * in_features
        n_blocks = -(-n_weights // BLOCK_SIZE)
        specs = {
            "weight": TensorSpec((-(-n_weights // 2) // self.storage.itemsize, 1), self.storage),
            "weight.absmax": TensorSpec((n_blocks,), torch.uint8 if self.nested else torch.float32),
            "weight.quant_map": TensorSpec((16,), torch.float32),
            self.state_suffix: TensorSpec((len(self._state(out_features, in_features, dtype)),), torch.uint8),
        }
        if self.nested:
            specs["weight.nested_absmax"] = TensorSpec((-(-n_blocks // NESTED_BLOCK_SIZE),), torch.float32)
            specs["weight.nested_quant_map"] = TensorSpec((256,), torch.float32)
        return specs

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, rounding: Rounding = round_to_nearest
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a weight, by suffix; it is read a tile of whole blocks at a time."""
        assert self == Float4(self.quant_type), "nested blocks and other storage are read, not written"
        assert rounding is round_to_nearest, "nf4 and fp4 have no other method"
        functional = bitsandbytes().functional
        out_features, in_features = weight.shape
        whole_blocks = BLOCK_SIZE // math.gcd(BLOCK_SIZE, in_features)
        tile_rows = whole_blocks * max(1, TILE_WEIGHTS // (in_features * whole_blocks))

        def quantize_rows(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            tile = weight[rows].contiguous()
            packed, state = functional.quantize_4bit(tile, blocksize=BLOCK_SIZE, quant_type=self.quant_type)
            return packed, state.absmax

        packed, absmax = zip(*map_tiles(quantize_rows, out_features, tile_rows, weight.device), strict=True)
        state = self._state(out_features, in_features, dtype)
        return {
            "weight": torch.cat(packed),
            "weight.absmax": torch.cat(absmax),
            "weight.quant_map": functional.get_4bit_type(self.quant_type, device="cpu"),
            self.state_suffix: torch.tensor(list(state), dtype=torch.uint8),
        }

    def linear(self, in_features: int, out_features: int) -> "Float4Linear":
        return Float4Linear(self, in_features, out_features)

    def _state(self, out_features: int, in_features: int, dtype: torch.dtype) -> bytes:
        state = {
            "quant_type": self.quant_type,
            "blocksize": BLOCK_SIZE,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [out_features, in_features],
        }
        return json.dumps(state).encode()


class Float4Linear(QuantizedLinear):
    """Computes with bitsandbytes' matmul_4bit, on the bytes as they are stored, in x's dtype.

    (Its own layer repacks the weight on some CPUs, and then computes in bfloat16.)
    """

    kept = frozenset({"weight"})

    qweight: torch.Tensor
    absmax: torch.Tensor
    quant_map: torch.Tensor

    def __init__(self, scheme: Float4, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scheme = scheme
        for name in ("qweight", "absmax", "quant_map"):
            self.register_buffer(name, None, persistent=False)

    def stored(self) -> dict[str, tuple[int, ...]]:
        specs = self.scheme.specs(self.out_features, self.in_features, torch.bfloat16)
        # The state's JSON names a dtype and may hold an offset: its length is not known.
        return {suffix: spec.shape for suffix, spec in specs.items()} | {self.scheme.state_suffix: (-1,)}

    def load_stored(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        if tensors["weight"].dtype != self.scheme.storage:
            raise IntegrityError(
                f"weight is stored as {tensors['weight'].dtype}, not as {self.scheme.storage}"
            )
        state = self._checked_state(tensors)
        absmax = tensors["weight.absmax"]
        if self.scheme.nested:
            values = tensors["weight.nested_quant_map"][absmax.long()]
            absmax = values * _by_block(tensors["weight.nested_absmax"], NESTED_BLOCK_SIZE, absmax.numel())
            absmax = absmax + state["nested_offset"]
        self.qweight = tensors["weight"].view(torch.uint8).view(-1, 1).to(device)
        self.absmax = absmax.to(device)
        self.quant_map = tensors["weight.quant_map"].to(device)

    def _checked_state(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The quantization state, after comparing it with what the scheme and the layer ask for."""
        expected = {
            "quant_type": self.scheme.quant_type,
            "blocksize": BLOCK_SIZE,
            "shape": [self.out_features, self.in_features],
        }
        if self.scheme.nested:
            expected["nested_blocksize"] = NESTED_BLOCK_SIZE
        try:
            state: dict[str, Any] = json.loads(bytes(tensors[self.scheme.state_suffix].tolist()))
            found = {key: state[key] for key in expected}
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{self.scheme.state_suffix} is not a quantization state: {error}"
            ) from error
        if found != expected:
            raise IntegrityError(f"{self.scheme.state_suffix} is {found} where {expected} is needed")
        own_map = bitsandbytes().functional.get_4bit_type(self.scheme.quant_type, device="cpu")
        if not torch.allclose(tensors["weight.quant_map"], own_map, atol=1e-6):
            raise IntegrityError(f"weight.quant_map is not that of {self.scheme.quant_type}")
        return state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        library = bitsandbytes()
        state = self._quant_state(self.absmax, (self.out_features, self.in_features), x.dtype)
        y: torch.Tensor = library.matmul_4bit(x, self.qweight.t(), quant_state=state)
        return y

    def dense_rows(self, start: int, stop: int) -> torch.Tensor:
        first, last = start * self.in_features, stop * self.in_features
        blocks = slice(first // BLOCK_SIZE, -(-last // BLOCK_SIZE))
        packed = self.qweight[blocks.start * BLOCK_SIZE // 2 : blocks.stop * BLOCK_SIZE // 2]
        state = self._quant_state(self.absmax[blocks], (1, packed.numel() * 2), torch.float32)
        flat = bitsandbytes().functional.dequantize_4bit(packed, state).flatten()
        rows: torch.Tensor = flat[first - blocks.start * BLOCK_SIZE :][: last - first]
        return rows.view(stop - start, self.in_features)

    def _quant_state(self, absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        return bitsandbytes().functional.QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            code=self.quant_map,
            blocksize=BLOCK_SIZE,
            quant_type=self.scheme.quant_type,
            dtype=dtype,
        )


def _by_block(values: torch.Tensor, block_size: int, n: int) -> torch.Tensor:
    """Each value repeated for the members of its block, n in all."""
    return values.repeat_interleave(block_size)[:n]
