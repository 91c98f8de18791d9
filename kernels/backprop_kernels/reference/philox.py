"""Philox4x32-10, the counter-based generator behind dropout (Salmon et al., SC'11)."""

from __future__ import annotations

import numpy as np

from backprop_kernels.arrays import Array, Dropout

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Four random 32-bit words for each column of `counter` (4, n), as uint64."""
    x = [c.astype(np.uint64) for c in counter]
    k = list(key)
    for _ in range(ROUNDS):
        a = x[0] * np.uint64(MULTIPLIERS[0])
        b = x[2] * np.uint64(MULTIPLIERS[1])
        high, low = np.uint64(32), LOW
        x = [
            (b >> high) ^ x[1] ^ np.uint64(k[0]),
            b & low,
            (a >> high) ^ x[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[i] + KEY_STEPS[i]) & 0xFFFFFFFF for i in range(2)]
    return np.stack(x)


def keep_mask(shape: tuple[int, int], dropout: Dropout) -> Array:
    """True where an element is kept; flat element e takes word e % 4 of block e // 4."""
    size = shape[0] * shape[1]
    seed, step = (int(v) for v in dropout.stream)
    block = np.arange((size + 3) // 4, dtype=np.uint64)
    counter = np.stack(
        [
            block & LOW,
            block >> np.uint64(32),
            np.full_like(block, step & 0xFFFFFFFF),
            np.full_like(block, dropout.layer),
        ]
    )
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    threshold = np.uint64(round(dropout.rate * 2**32))
    return words.T.reshape(-1)[:size].reshape(shape) >= threshold
