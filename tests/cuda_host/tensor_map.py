"""Tensor maps for TMA: cuTensorMapEncodeTiled's on a GPU, a plain record in the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.cuda_host import cupy_stand_in

BFLOAT16, SWIZZLE_128, PROMOTE_256 = 9, 3, 3  # of enum CUtensorMap…
PLAIN = np.dtype(
    {
        "names": ["base", "columns", "rows", "row_bytes", "box_columns", "box_rows", "size", "swz"],
        "formats": ["u8", "i8", "i8", "i8", "i4", "i4", "i4", "i4"],
        "itemsize": 128,
    }
)  # fmt: skip


def tensor_map(matrix: Any, box_rows: int) -> np.ndarray:
    """The map of a row-major matrix of 16-bit floats in boxes of 64 columns, 128-byte swizzle.

    128 bytes in an array of size one, which CuPy passes by value.
    """
    rows, columns = matrix.shape
    # The documented limits, which the emulator would not notice.
    assert matrix.data.ptr % 16 == 0 and matrix.strides[0] % 16 == 0
    assert 1 <= box_rows <= 256 and matrix.dtype.itemsize == 2
    raw = np.zeros(128 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    encoded = raw[start : start + 128]
    if isinstance(matrix, cupy_stand_in.ndarray):
        record = (matrix.data.ptr, columns, rows, matrix.strides[0], 64, box_rows, 2, 1)
        encoded.view(PLAIN)[0] = record
    else:
        failed = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
            ctypes.c_void_p(encoded.ctypes.data), BFLOAT16, ctypes.c_uint32(2),
            ctypes.c_void_p(matrix.data.ptr), (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(matrix.strides[0]), (ctypes.c_uint32 * 2)(64, box_rows),
            (ctypes.c_uint32 * 2)(1, 1), 0, SWIZZLE_128, PROMOTE_256, 0,
        )  # fmt: skip
        assert not failed, f"cuTensorMapEncodeTiled: CUresult {failed}"
    return encoded.view(np.dtype((np.void, 128)))
