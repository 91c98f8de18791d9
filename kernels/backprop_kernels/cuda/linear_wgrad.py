"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad

The kernel and its contract: linear_wgrad.cu; a batch that is cut is finished by column_sums.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, plain_variant
from backprop_kernels.cuda.launch import empty, launch, on_device
from backprop_kernels.cuda.tiles import tiling

BLOCKS_WANTED = 512  # about two rounds of the largest GPU's multiprocessors
LEAST_ROWS = 256  # of the batch per block: below, adding the slices costs as much as it saves


def linear_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    checks.linear_wgrad(dZ, X, out)
    on_device("linear_wgrad", dZ=dZ, X=X, out=out)
    (batch, out_features), in_features = dZ.shape, X.shape[1]
    dW = empty((out_features, in_features), dZ.dtype) if out is None else out
    if not dW.size:
        return dW
    tile, blocks = tiling(dZ.dtype, out_features, in_features)
    # By the shape alone, so that another GPU adds in the same order.
    splits = max(1, min(-(-BLOCKS_WANTED // blocks), -(-batch // LEAST_ROWS)))
    rows = -(-batch // splits)
    slices = dW if splits == 1 else empty((splits, dW.size), dZ.dtype)
    launch(
        Unit("linear_wgrad.cu", plain_variant(dZ.dtype)), f"linear_wgrad_{tile.name}",
        (blocks, splits), (tile.threads,), dZ, X, slices, out_features, in_features, batch, rows,
    )  # fmt: skip
    if splits > 1:
        column_sums(slices, dW.reshape(-1))
    return dW
