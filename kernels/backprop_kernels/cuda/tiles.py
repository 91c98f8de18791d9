"""How a product is cut into blocks of threads: the sizes of product.cuh, and which one serves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Tile(NamedTuple):
    """One block of threads computes rows × columns elements."""

    name: str
    rows: int
    columns: int
    threads: int

    def blocks(self, rows: int, columns: int) -> int:
        """How many blocks cover a matrix."""
        return -(-rows // self.rows) * -(-columns // self.columns)


LARGE = {"float32": Tile("large", 128, 128, 256), "float64": Tile("large", 64, 64, 256)}
SMALL = Tile("small", 32, 32, 64)
ENOUGH_BLOCKS = 64  # large tiles leave fewer multiprocessors than this without work


def tiling(dtype: np.dtype[Any], rows: int, columns: int) -> tuple[Tile, int]:
    """(tile, blocks) for a product of this size; by the shape alone, so that no bit depends on
    the GPU."""
    large = LARGE[str(dtype)]
    tile = large if large.blocks(rows, columns) >= ENOUGH_BLOCKS else SMALL
    return tile, tile.blocks(rows, columns)
