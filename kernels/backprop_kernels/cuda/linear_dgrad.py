"""linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad

The kernel and its contract: linear_dgrad.cu; db_prev is finished by column_sums.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, dropout_arguments, variant
from backprop_kernels.cuda.launch import empty, launch, on_device
from backprop_kernels.cuda.tiles import tiling


def linear_dgrad(
    dZ: Array,
    W: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """dZ (batch, out), W (out, in), the layer below → dZ_prev (batch, in), db_prev (in)."""
    checks.linear_dgrad(dZ, W, saved, activation, dropout, out)
    (batch, out_features), in_features = dZ.shape, W.shape[1]
    dZ_prev, db_prev = out or (None, empty((in_features,), dZ.dtype))
    on_device("linear_dgrad", dZ=dZ, W=W, saved=saved, out_dZ_prev=dZ_prev, out_db_prev=db_prev)
    if dZ_prev is None:
        dZ_prev = empty((batch, in_features), dZ.dtype)
    tile, blocks = tiling(dZ.dtype, batch, in_features)
    partial = None
    if db_prev is not None:
        partial = empty((-(-batch // tile.rows), in_features), dZ.dtype)
    if dZ_prev.size:
        launch(
            Unit("linear_dgrad.cu", variant(dZ.dtype, activation)), f"linear_dgrad_{tile.name}",
            (blocks,), (tile.threads,), dZ, W, saved, dZ_prev, partial, batch, in_features,
            out_features, *dropout_arguments(dropout, dZ.dtype),
        )  # fmt: skip
    if partial is not None:
        column_sums(partial, db_prev)
    return dZ_prev, db_prev
