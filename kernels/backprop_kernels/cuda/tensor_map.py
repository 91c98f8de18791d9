"""Tensor maps: how TMA finds boxes of a row-major matrix (include/ptx.cuh, `TensorMap`).

CuPy does not bind the driver's encoder, so it is called through ctypes. A map holds addresses and
sizes, no data; it goes to a kernel by value, also into a CUDA graph.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.errors import DeviceUnavailableError

BYTES, ALIGNMENT = 128, 64
ROWS_ON = 16  # bytes: where the first row starts, and the distance of rows
LONGEST = 2**31 - 2**10  # rows or columns: kernels count in 32 bits, and a tile may reach beyond
# Of the driver's enumerations CUtensorMapDataType, …Swizzle and …L2promotion.
TYPES = {"uint16": 9, "float16": 6, "float32": 7}  # bfloat16 lies in uint16
SWIZZLE_NONE, SWIZZLE_128, PROMOTE_256 = 0, 3, 3


class TensorMap(NamedTuple):
    """`encoded` is an array of one element of 128 bytes, which CuPy passes by value."""

    encoded: np.ndarray
    matrices: tuple[Array, ...]


def can_map(*matrices: Array) -> bool:
    """Whether TMA takes them: rows that start on 16 bytes, not too many, and some elements."""
    return all(
        m.size > 0
        and max(m.shape) <= LONGEST
        and m.data.ptr % ROWS_ON == 0
        and m.shape[1] * m.itemsize % ROWS_ON == 0
        for m in matrices
    )


def pitch(matrix: Array) -> int:
    """Bytes from one row to the next; to where it could be, if there is but one."""
    if len(matrix) > 1:
        return int(matrix.strides[0])
    return -(-int(matrix.nbytes) // ROWS_ON) * ROWS_ON


def two(first: TensorMap, second: TensorMap) -> TensorMap:
    """Both as one argument: a structure of two maps."""
    place = _place(2 * BYTES)
    place[:BYTES], place[BYTES:] = (m.encoded.view(np.uint8) for m in (first, second))
    return TensorMap(place.view(np.dtype((np.void, 2 * BYTES))), first.matrices + second.matrices)


def tensor_map(matrix: Array, box: tuple[int, int], swizzled: bool) -> TensorMap:
    """The map of a row-major matrix in boxes of (rows, columns), each at most 256.

    Swizzled, a row of a box is 128 bytes, whose chunks of 16 are crossed with the row's number.
    """
    place = _place(BYTES)
    encode(place, matrix, box, swizzled)
    return TensorMap(place.view(np.dtype((np.void, BYTES))), (matrix,))


def _place(size: int) -> np.ndarray:
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def encode(place: np.ndarray, matrix: Array, box: tuple[int, int], swizzled: bool) -> None:
    """Write the map to 128 bytes on 64."""
    rows, columns = matrix.shape
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as problem:
        raise DeviceUnavailableError(
            f"device: libcuda.so.1, NVIDIA's driver, was not found ({problem}); install it"
        ) from problem
    failed = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(place.ctypes.data), TYPES[str(matrix.dtype)], ctypes.c_uint32(2),
        ctypes.c_void_p(matrix.data.ptr), (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(pitch(matrix)), (ctypes.c_uint32 * 2)(*box[::-1]),
        (ctypes.c_uint32 * 2)(1, 1), 0, SWIZZLE_128 if swizzled else SWIZZLE_NONE, PROMOTE_256, 0,
    )  # fmt: skip
    if failed:
        raise DeviceUnavailableError(
            f"device: cuTensorMapEncodeTiled refused {rows} x {columns} {matrix.dtype} at "
            f"{matrix.data.ptr:#x} in boxes of {box}: CUresult {failed}"
        )
