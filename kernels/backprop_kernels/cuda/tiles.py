"""How a product is cut into blocks of threads, and which kernel computes it: `choose`.

Two generations: "simt" multiplies `real` numbers one by one on any GPU (product.cuh); "ampere"
uses tensor cores, from sm_80 on (tensor_product.cuh). Their tiles are the tables below.
"""

from __future__ import annotations

from typing import NamedTuple

from backprop_kernels.errors import OptionError
from backprop_kernels.precisions import PRECISIONS, Precision

TENSOR_CORES = 80  # the compute capability that has them for every precision of the table
STRIP_BYTES = 64  # of K, per row of a strip in shared memory, as tensor_product.cuh has it


class Tile(NamedTuple):
    """One block of threads computes rows × columns elements; a line of TILES."""

    generation: str
    name: str
    rows: int
    columns: int
    threads: int
    shared: int  # bytes of dynamic shared memory
    header: str
    numbers: tuple[int, ...]  # the template's arguments in that header

    def blocks(self, rows: int, columns: int) -> int:
        """How many blocks cover a matrix."""
        return -(-rows // self.rows) * -(-columns // self.columns)


def _simt(name: str, m: int, n: int, k: int, rows: int, columns: int) -> Tile:
    threads = m * n // (rows * columns)
    return Tile("simt", name, m, n, threads, 0, "product.cuh", (m, n, k, rows, columns))


def _ampere(name: str, m: int, n: int, warp_m: int, warp_n: int, stages: int) -> Tile:
    threads, shared = 32 * (m // warp_m) * (n // warp_n), stages * (m + n) * STRIP_BYTES
    numbers = (m, n, warp_m, warp_n, stages)
    return Tile("ampere", name, m, n, threads, shared, "tensor_product.cuh", numbers)


# The largest first: it needs the least memory traffic, where there are blocks enough to fill a GPU.
SMALL = _simt("small", 32, 32, 16, 4, 4)
AMPERE = (
    _ampere("wide", 128, 256, 64, 64, 4),
    _ampere("large", 128, 128, 64, 64, 4),
    _ampere("small", 64, 64, 32, 32, 4),
)
# Where an operand is several factors, a warp has registers for half the sums.
PLANES = _ampere("halved", 128, 128, 64, 32, 4), AMPERE[-1]
# What lies in memory, and what is multiplied: the C++ types of floats.cuh.
NUMBERS = {
    "float32": ("real", "real"),
    "float64": ("real", "real"),
    "tf32": ("real", "tf32"),
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "bf16x3": ("real", "bf16_planes<2>"),
    "bf16x6": ("real", "bf16_planes<3>"),
}
TILES = {
    "float32": (_simt("large", 128, 128, 8, 8, 8), SMALL),
    "float64": (_simt("large", 64, 64, 8, 4, 4), SMALL),
    "tf32": AMPERE,
    "bf16": AMPERE,
    "fp16": AMPERE,
    "bf16x3": PLANES,
    "bf16x6": PLANES,
}
ENOUGH_BLOCKS = 64  # fewer would leave multiprocessors of a large GPU without work


class Choice(NamedTuple):
    """The kernel for one product."""

    operator: str
    precision: Precision
    tile: Tile
    blocks: int
    why: str

    @property
    def types(self) -> tuple[str, ...]:
        """The lines of variant.cuh that make the kernel this one."""
        stored, operand = NUMBERS[self.precision.name]
        return (
            '#include "floats.cuh"',
            f"using stored = {stored};",
            f"using operand = {operand};",
            f'#define PRODUCT "{self.tile.header}"',
            f"#define TILE {', '.join(map(str, self.tile.numbers))}",
        )


def choose(
    operator: str, rows: int, columns: int, terms: int, precision: str, capability: int
) -> Choice:
    """The kernel that computes a product of rows × columns elements, each a sum of `terms`.

    The same on every GPU that can run it, so that no bit depends on the GPU. `why` says in words
    what decided. Raises OptionError where the GPU cannot multiply in this precision.
    """
    row = PRECISIONS[precision]
    if row.tensor_cores and capability < TENSOR_CORES:
        raise OptionError(
            f'{operator}: precision: "{precision}" needs a GPU of compute capability 8.0 or more, '
            f"got {capability // 10}.{capability % 10}; use float32"
        )
    tiles = TILES[precision]
    tile = next((t for t in tiles if t.blocks(rows, columns) >= ENOUGH_BLOCKS), tiles[-1])
    blocks = tile.blocks(rows, columns)
    unit = "tensor cores by mma.sync" if row.tensor_cores else "ordinary arithmetic"
    enough = (
        f"the largest tile that gives {ENOUGH_BLOCKS} blocks or more"
        if blocks >= ENOUGH_BLOCKS
        else f"the smallest tile, as no tile gives {ENOUGH_BLOCKS} blocks"
    )
    why = (
        f"{operator} of {rows} × {columns} elements, {terms} terms each, in {precision}: {unit}, "
        f"{blocks} block(s) of {tile.rows} × {tile.columns}, {enough}"
    )
    return Choice(operator, row, tile, blocks, why)
