"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad

The kernel and its contract: linear_wgrad.cu; a batch that is cut is finished by column_sums.cu.
"""

from __future__ import annotations

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.by_tiles import grid, read, written
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, plain_variant
from backprop_kernels.cuda.launch import capability, constant, empty, launch, on_device
from backprop_kernels.cuda.tensor_map import can_map
from backprop_kernels.cuda.tiles import LIBRARY, choose
from backprop_kernels.precisions import PRECISIONS


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
    real = PRECISIONS[precision or str(dZ.dtype)].real
    dW = empty((out_features, in_features), real) if out is None else out
    if not dW.size:
        return dW
    choice = choose(
        "linear_wgrad", out_features, in_features, batch, precision or str(dZ.dtype),
        capability(dZ), can_map(dZ, X, dW),
    )  # fmt: skip
    tile = choice.tile
    if tile is LIBRARY:
        cublaslt.product("linear_wgrad", choice.precision.name, dZ, X, dW, unscale)
        return dW
    runs = max(1, -(-batch // choice.run))
    slices, unfinished, turns = dW, None, None
    if runs > 1 and tile.generation == "hopper":
        tiles = tile.clusters(out_features, in_features) * tile.cluster
        unfinished = empty((tiles, tile.rows, tile.columns), real)
        turns = constant(np.zeros((tiles, tile.rows // tile.summed_rows)), np.uint32)
    elif runs > 1:
        slices = empty((runs, dW.size), real)
    launch(
        Unit("linear_wgrad.cu", plain_variant(real, choice.types)), "linear_wgrad",
        grid(choice, out_features, in_features, runs, dZ), (tile.threads,), read(tile, dZ),
        read(tile, X), unscale, written(tile, slices), unfinished, turns, out_features,
        in_features, batch, choice.run, shared=tile.shared,
    )  # fmt: skip
    if slices is not dW:
        column_sums(slices, dW.reshape(-1))
    return dW
