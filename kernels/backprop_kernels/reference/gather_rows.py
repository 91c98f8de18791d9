"""gather_rows: Y_r = X_(index_r).  docs/derivations.md#gather_rows"""

from __future__ import annotations

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array


def gather_rows(X: Array, index: Array, out: Array | None = None) -> Array:
    """X (rows, …), index (n,) int64 → Y (n, …). Indices beyond X take its nearest row."""
    checks.gather_rows(X, index, out)
    return np.take(X, index, axis=0, out=out, mode="clip")
