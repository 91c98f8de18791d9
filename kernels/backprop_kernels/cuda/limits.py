"""Limits on the length of a gradient's tensor and of a neuron's weights, as parts of a step.

The kernels and their contract: limits.cu.
"""

from __future__ import annotations

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.launch import empty, launch
from backprop_kernels.cuda.rows import THREADS, blocks_for


def limit_tensor(G: Array, limit: float) -> None:
    """Scale G down to the L2 norm `limit`, where it is longer."""
    squares = empty((blocks_for(G.size),), np.float64)
    unit, grid = Unit("limits.cu", plain_variant(G.dtype)), squares.shape
    launch(unit, "tensor_squares", grid, (THREADS,), G, squares, G.size)
    launch(
        unit, "tensor_limit", grid, (THREADS,), G, squares, len(squares), np.float64(limit), G.size
    )


def limit_rows(W: Array, limit: float, norm: Array, guard: Array) -> None:
    """Scale each row of W down to `limit`; nothing where the optimizer has refused its step."""
    rows, columns = W.shape
    unit = Unit("limits.cu", plain_variant(W.dtype))
    launch(unit, "row_limit", (rows,), (THREADS,), W, np.float64(limit), norm, guard, columns)
