"""Copies that lie along K, for products that take no others; the kernel and its contract:
transpose.cu.

A copy (columns, rows) of a float32 matrix (rows, columns) is rounded to tf32. Its rows start on 16
bytes, so that it may be a view of a wider array.
"""

from __future__ import annotations

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.launch import empty, launch
from backprop_kernels.cuda.rows import THREADS, WARP
from backprop_kernels.cuda.tensor_map import ROWS_ON, pitch
from backprop_kernels.errors import ShapeError


def padded(rows: int, itemsize: int = 4) -> int:
    """The length of a copy's rows in memory, in elements."""
    return -(-rows * itemsize // ROWS_ON) * ROWS_ON // itemsize


def transposed(matrix: Array, out: Array | None = None) -> Array:
    """The copy of a matrix, in a place of its own or in `out`."""
    rows, columns = matrix.shape
    if out is None:
        out = empty((columns, padded(rows)), matrix.dtype)[:, :rows]
    expect_copy(matrix, out)
    if matrix.size:
        blocks = -(-rows // WARP) * -(-columns // WARP)
        unit = Unit("transpose.cu", plain_variant(matrix.dtype))
        launch(
            unit, "transpose", (blocks,), (THREADS,), matrix, out, rows, columns,
            pitch(out) // out.itemsize,
        )  # fmt: skip
    return out


def expect_copy(matrix: Array, copy: Array) -> None:
    """Refuse what cannot be the copy of a matrix."""
    shape, float32 = matrix.shape[::-1], np.dtype(np.float32)
    on_16 = not copy.size or copy.data.ptr % ROWS_ON == pitch(copy) % ROWS_ON == 0
    if copy.shape != shape or {matrix.dtype, copy.dtype} != {float32} or not on_16:
        raise ShapeError(
            f"transpose: copy: expected {float32} of shape {shape}, rows on {ROWS_ON} bytes, got "
            f"{copy.dtype} of shape {copy.shape}, strides {copy.strides}"
        )
