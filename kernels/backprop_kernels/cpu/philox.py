"""Philox4x32-10 in a kernel: the same bits as reference/philox.py, four elements at a time."""

from __future__ import annotations

from typing import Any

KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
LOW = 0xFFFFFFFF


def drop_row(dtype: str) -> Any:
    """A Numba function (args, C, start, count): drop or scale C[start : start + count]."""
    import numba
    from numba import types, uint64

    from backprop_kernels.cpu.epilogue import LAYER, SCALE, STREAM, THRESHOLD
    from backprop_kernels.cpu.memory import int64s, pointer

    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)

    @numba.njit(error_model="numpy", _nrt=False)
    def philox(x0, x1, x2, x3, k0, k1):
        low = uint64(LOW)
        shift = uint64(32)
        for _ in range(10):
            a, b = x0 * uint64(MULTIPLIER_0), x2 * uint64(MULTIPLIER_1)
            x0, x1, x2, x3 = (b >> shift) ^ x1 ^ k0, b & low, (a >> shift) ^ x3 ^ k1, a & low
            k0, k1 = (k0 + uint64(KEY_STEP_0)) & low, (k1 + uint64(KEY_STEP_1)) & low
        return x0, x1, x2, x3

    @numba.njit(error_model="numpy", _nrt=False)
    def drop(args, C, start, count):
        stream = int64s(args[STREAM])
        seed, step = uint64(stream[0]), uint64(stream[1]) & uint64(LOW)
        k0, k1 = seed & uint64(LOW), seed >> uint64(32)
        layer, threshold = uint64(args[LAYER]), uint64(args[THRESHOLD])
        scale = floats(args[SCALE])[0]
        e = start
        while e < start + count:
            block = uint64(e // 4)
            w = philox(block & uint64(LOW), block >> uint64(32), step, layer, k0, k1)
            for lane in range(e % 4, min(4, e % 4 + start + count - e)):
                C[e] = C[e] * scale if w[lane] >= threshold else zero
                e += 1

    return drop
