"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad

The kernel and its contract: linear_wgrad.cu; a batch that is cut is finished by column_sums.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, plain_variant
from backprop_kernels.cuda.launch import capability, empty, launch, on_device
from backprop_kernels.cuda.tiles import choose

BLOCKS_WANTED = 512  # about two rounds of the largest GPU's multiprocessors
LEAST_ROWS = 256  # of the batch per block: below, adding the slices costs as much as it saves


def linear_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    return wgrad(None, None, dZ, X, out)


def wgrad(
    precision: str | None, unscale: Array | None, dZ: Array, X: Array, out: Array | None = None
) -> Array:
    """`linear_wgrad` in a precision, or dZ's own; `unscale` as in linear_dgrad.py."""
    checks.linear_wgrad(dZ, X, out, precision)
    on_device("linear_wgrad", dZ=dZ, X=X, out=out)
    (batch, out_features), in_features = dZ.shape, X.shape[1]
    choice = choose(
        "linear_wgrad", out_features, in_features, batch, precision or str(dZ.dtype),
        capability(dZ),
    )  # fmt: skip
    real, tile = choice.precision.real, choice.tile
    dW = empty((out_features, in_features), real) if out is None else out
    if not dW.size:
        return dW
    # By the shape alone, so that another GPU adds in the same order.
    splits = max(1, min(-(-BLOCKS_WANTED // choice.blocks), -(-batch // LEAST_ROWS)))
    rows = -(-batch // splits)
    slices = dW if splits == 1 else empty((splits, dW.size), real)
    launch(
        Unit("linear_wgrad.cu", plain_variant(real, choice.types)), "linear_wgrad",
        (choice.blocks, splits), (tile.threads,), dZ, X, unscale, slices, out_features,
        in_features, batch, rows, shared=tile.shared,
    )  # fmt: skip
    if splits > 1:
        column_sums(slices, dW.reshape(-1))
    return dW
