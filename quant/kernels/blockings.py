"""How the matmuls for few rows are cut into programs: a table made by benchmarks/tune.py, and a rule for the rest.

The table, blockings.json, maps a compute capability ("9.0") and a key (kernel, bits, rows, sizes) to outputs of a
program, words of a tile, warps and tiles ahead. Nothing is tuned while the program runs.
"""

import json
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

TABLE = Path(__file__).with_name("blockings.json")


Kernel = Literal["matvec", "tiles"]
"""Which kernel: that of `quant.kernels.matvec` or that of `quant.kernels.tiles`."""


@dataclass(frozen=True)
class Blocking:
    """How a matmul is cut: outputs of a program, words of a row that it reads at once, and warps.

    `ahead` tiles are on their way while one is multiplied. For "tiles" the words are 16 for each warp, times the tiles
    that a warp has on their way, and `ahead` is 1; of a row's words they are a divisor if they can. Outputs are 8 (with
    a gate), 16 or 32.
    """

    outputs: int
    words: int
    warps: int
    ahead: int = 1


class Sizes(Protocol):
    """What a blocking depends on: `quant.kernels.matvec.Weight`."""

    @property
    def bits(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


def key_of(weight: Sizes, n_rows: int, kernel: Kernel = "matvec") -> str:
    """The table's key; rows count as the next power of two, as in the kernel."""
    rows = 1 << (n_rows - 1).bit_length()
    if kernel == "tiles":
        return f"tiles int{weight.bits} {max(rows, 8)} rows {weight.out_features}x{weight.in_features}"
    return f"int{weight.bits} {rows} rows {weight.out_features}x{weight.in_features}"


def blocking_for(
    weight: Sizes, n_rows: int, capability: tuple[int, int], kernel: Kernel = "matvec"
) -> Blocking:
    """The tuned blocking where there is one for the sizes, else what does well without."""
    found = tuned("{}.{}".format(*capability)).get(key_of(weight, n_rows, kernel))
    return found or (_default_tiles(weight) if kernel == "tiles" else _default(weight, n_rows))


def _default_tiles(weight: Sizes) -> Blocking:
    n_words = weight.in_features * weight.bits // 32
    warps = 8 if weight.out_features <= 8192 else 4
    while warps > 1 and n_words % (16 * warps):
        warps //= 2
    depth = 2 if n_words % (32 * warps) == 0 else 1
    return Blocking(16, 16 * warps * depth, warps)


def _default(weight: Sizes, n_rows: int) -> Blocking:
    n_words = weight.in_features * (weight.bits if weight.bits < 16 else 32) // 32
    words, outputs = (256, 4) if weight.bits == 4 else (512, 2)
    warps = 1
    if n_rows > 1:
        words, outputs = 128, 4
    elif n_words >= 1024 and weight.bits < 16:
        outputs, warps = 8, words // 128
    while n_words % words and words > 64:  # tiles that fit need no masks
        words //= 2
    return Blocking(outputs, words, warps)


@cache
def tuned(capability: str) -> dict[str, Blocking]:
    """A card's part of the table, by key; benchmarks/tune.py changes it while it searches."""
    return read_table().get(capability, {})


def read_table() -> dict[str, dict[str, Blocking]]:
    """The whole table, by compute capability and key."""
    if not TABLE.is_file():
        return {}
    table = json.loads(TABLE.read_text())
    return {one: {key: Blocking(*entry) for key, entry in found.items()} for one, found in table.items()}


def write_table(table: dict[str, dict[str, Blocking]]) -> None:
    """Replace the table."""
    lines = []
    for capability, found in sorted(table.items()):
        rows = [f'  "{key}": {json.dumps(astuple(one))}' for key, one in sorted(found.items())]
        lines.append(f' "{capability}": {{\n' + ",\n".join(rows) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
