"""What the launchers of the three products share: matrices and grid as a generation takes them."""

from __future__ import annotations

from backprop_kernels.arrays import Array
from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.cast import rounded
from backprop_kernels.cuda.launch import empty, multiprocessors
from backprop_kernels.cuda.tensor_map import TensorMap, tensor_map, two
from backprop_kernels.cuda.tiles import LIBRARY, Choice, Tile
from backprop_kernels.cuda.transpose import expect_copy, transposed

# As hopper_product.cuh has them: rows of what TMA reads at once and the bytes of each, rows and
# columns of what it writes.
BOX_ROWS, BOX_BYTES, OUT_BOX = 64, 128, (32, 32)


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
    box = BOX_ROWS, BOX_BYTES // matrix.itemsize
    return tensor_map(matrix, box, swizzled=True) if tile.generation == "hopper" else matrix


def along_k(choice: Choice, matrix: Array, is_rounded: bool) -> Array:
    """A matrix whose rows K runs along; rounded, for a kernel that would cut it off."""
    return rounded(matrix) if choice.along_k and not is_rounded else matrix


def down_k(choice: Choice, matrix: Array, copy: Array | None = None) -> Array:
    """A matrix down which K runs; for a kernel that takes none such its copy (transpose.py)."""
    if not choice.along_k:
        return matrix
    return transposed(matrix) if copy is None else copy


def result(stored: str, is_rounded: bool, copy: Array | None) -> tuple[str, ...]:
    """The lines of variant.cuh that say what a product gives: `stored`, or tf32 for the product
    that reads it next, and whether the kernel writes the copy for another one as well."""
    if copy is not None:
        return "using result = tf32;", "#define TRANSPOSED"
    return (f"using result = {'tf32' if is_rounded else stored};",)


def written(tile: Tile, matrix: Array, copy: Array | None = None) -> Array | TensorMap:
    """What a product gives; and its copy, to a kernel that writes both."""
    if tile.generation != "hopper":
        return matrix
    target = tensor_map(matrix, OUT_BOX, swizzled=False)
    if copy is None:
        return target
    expect_copy(matrix, copy)
    return two(target, tensor_map(copy, OUT_BOX, swizzled=True))


def grid(choice: Choice, rows: int, columns: int, runs: int, on: Array) -> tuple[int, int]:
    """A block for each tile and run; on Hopper as many as are there at the same time."""
    tile = choice.tile
    if tile.generation != "hopper":
        return tile.blocks(rows, columns), runs
    clusters = min(tile.clusters(rows, columns) * runs, multiprocessors(on) // tile.cluster)
    return clusters * tile.cluster, 1
