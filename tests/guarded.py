"""Buffers that show what a kernel did wrong to memory.

Each array of a call lies between two canaries; outputs start as poison (0xFF bytes, a NaN that no
arithmetic makes; of words of bits, where that is common, 0x5A); inputs are copied beforehand. Half
of the arrays start one element past a cache line, so a kernel that assumes alignment is caught too.
"""

from __future__ import annotations

import math

import numpy as np
from backprop_kernels.arrays import Array

CANARY, CANARY_BYTES = 0xA5, 4096
POISON, POISON_OF_BITS = 0xFF, 0x5A
LINE = 64


def poison(dtype: np.dtype) -> int:
    """The bytes of what nothing has written."""
    return POISON_OF_BITS if dtype == np.uint32 else POISON


def guarded(shape: tuple[int, ...], dtype: np.dtype, layout: str) -> tuple[Array, Array]:
    """A poisoned array and the bytes around it; layout is "aligned" or "offset" (one element)."""
    size = math.prod(shape) * dtype.itemsize
    block = np.full(2 * CANARY_BYTES + size + 2 * LINE, CANARY, np.uint8)
    start = CANARY_BYTES + -(block.ctypes.data + CANARY_BYTES) % LINE
    start += dtype.itemsize if layout == "offset" else 0
    block[start : start + size] = poison(dtype)
    return block[start : start + size].view(dtype).reshape(shape), block


class Guards:
    """The guarded arrays of one operator call.

    `phase` 0 or 1 chooses which half of the arrays is offset.
    """

    def __init__(self, phase: int = 0) -> None:
        self.phase = phase
        self.arrays: list[tuple[Array, Array]] = []
        self.inputs: list[tuple[Array, bytes]] = []
        self.outputs: list[Array] = []

    def output(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """An array that the call must fill."""
        array = self._place(shape, dtype)
        self.outputs.append(array)
        return array

    def input(self, values: Array | None) -> Array | None:
        """A copy of `values` that the call must not change."""
        if values is None:
            return None
        array = self.inout(values)
        self.inputs.append((array, array.tobytes()))
        return array

    def inout(self, values: Array) -> Array:
        """A copy of `values` that the call may change in place."""
        array = self._place(values.shape, values.dtype)
        array[...] = values
        return array

    def check(self) -> None:
        """Canaries intact, inputs unchanged, outputs written everywhere."""
        for array, block in self.arrays:
            start = array.ctypes.data - block.ctypes.data if array.size else CANARY_BYTES
            before, after = block[:start], block[start + array.nbytes :]
            assert (before == CANARY).all(), f"wrote before an array of shape {array.shape}"
            assert (after == CANARY).all(), f"wrote past an array of shape {array.shape}"
        for number, (array, before) in enumerate(self.inputs):
            assert array.tobytes() == before, f"changed input {number}, shape {array.shape}"
        for number, array in enumerate(self.outputs):
            raw = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.dtype.itemsize)
            left = (raw == poison(array.dtype)).all(axis=1).sum()
            assert left == 0, f"output {number}, shape {array.shape}: {left} elements not written"

    def _place(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        layout = "offset" if (len(self.arrays) + self.phase) % 2 else "aligned"
        array, block = guarded(shape, dtype, layout)
        self.arrays.append((array, block))
        return array
