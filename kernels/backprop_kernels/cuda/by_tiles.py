"""What the launchers of the three products share: matrices and grid as a generation takes them."""

from __future__ import annotations

from backprop_kernels.arrays import Array
from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.launch import empty, multiprocessors
from backprop_kernels.cuda.tensor_map import TensorMap, tensor_map
from backprop_kernels.cuda.tiles import LIBRARY, Choice, Tile

# As hopper_product.cuh has them: rows and columns of what TMA reads and writes at once.
BOX, OUT_BOX = (64, 64), (32, 32)


def operands(
    choice: Choice, first: Array, second: Array, rows: int, columns: int
) -> tuple[Array | TensorMap, Array | TensorMap | None]:
    """Both operands as the kernel takes them. Of the library's, it takes their product."""
    if choice.tile is not LIBRARY:
        return read(choice.tile, first), read(choice.tile, second)
    sums = empty((rows, columns), choice.precision.real)
    cublaslt.product(choice.operator, choice.precision.name, first, second, sums)
    return sums, None


def read(tile: Tile, matrix: Array) -> Array | TensorMap:
    """An operand of a product."""
    return tensor_map(matrix, BOX, swizzled=True) if tile.generation == "hopper" else matrix


def written(tile: Tile, matrix: Array) -> Array | TensorMap:
    """What a product gives."""
    return tensor_map(matrix, OUT_BOX, swizzled=False) if tile.generation == "hopper" else matrix


def grid(choice: Choice, rows: int, columns: int, runs: int, on: Array) -> tuple[int, int]:
    """A block for each tile and run; on Hopper as many as are there at the same time."""
    tile = choice.tile
    if tile.generation != "hopper":
        return choice.blocks, runs
    clusters = min(tile.clusters(rows, columns) * runs, multiprocessors(on) // tile.cluster)
    return clusters * tile.cluster, 1
