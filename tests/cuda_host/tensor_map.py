"""Tensor maps in the emulator: a plain record in the place of what the driver encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
from backprop_kernels.cuda.tensor_map import TYPES, pitch

PLAIN = np.dtype(
    {
        "names": ["base", "columns", "rows", "row_bytes", "box_columns", "box_rows", "size", "swz"],
        "formats": ["u8", "i8", "i8", "i8", "i4", "i4", "i4", "i4"],
        "itemsize": 128,
    }
)  # fmt: skip


def encode(place: np.ndarray, matrix: Any, box: tuple[int, int], swizzled: bool) -> None:
    """As tensor_map.encode; refuses what the driver would refuse."""
    rows, columns = matrix.shape
    row, inner = pitch(matrix), box[1] * matrix.itemsize
    assert str(matrix.dtype) in TYPES and place.ctypes.data % 64 == 0
    assert 0 < rows < 2**32 and 0 < columns < 2**32
    assert matrix.data.ptr % 16 == 0 and row % 16 == 0 and row < 2**40
    assert all(1 <= side <= 256 for side in box) and inner % 16 == 0
    assert not swizzled or inner <= 128
    record = (matrix.data.ptr, columns, rows, row, box[1], box[0], matrix.itemsize, swizzled)
    place.view(PLAIN)[0] = record
