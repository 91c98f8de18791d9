"""gather_rows: Y_r = X_(index_r).  docs/derivations.md#gather_rows

The kernel and its contract: gather_rows.cu.
"""

from __future__ import annotations

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.launch import empty, launch, on_device
from backprop_kernels.cuda.rows import THREADS, across

UNIT = Unit("gather_rows.cu", plain_variant(np.dtype(np.float32)))  # the dtype does not matter


def gather_rows(X: Array, index: Array, out: Array | None = None) -> Array:
    """X (rows, …), index (n,) int64 → Y (n, …). Indices beyond X take its nearest row."""
    checks.gather_rows(X, index, out)
    on_device("gather_rows", X=X, index=index, out=out)
    Y = empty((len(index), *X.shape[1:]), X.dtype) if out is None else out
    if Y.size:
        words = X.nbytes // len(X) // 4
        side = across(words)
        launch(
            UNIT, "gather_rows", (-(-len(index) * side // THREADS),), (THREADS,), X, index, Y,
            len(X), len(index), words, side,
        )  # fmt: skip
    return Y
