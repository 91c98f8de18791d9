"""linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad

The kernel and its contract: linear_dgrad.cu; db_prev is finished by column_sums.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.by_tiles import along_k, down_k, grid, operands, result, written
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import SAVES_BITS, column_sums, dropout_arguments, variant
from backprop_kernels.cuda.launch import capability, empty, launch, on_device
from backprop_kernels.cuda.part import adds_up, rows_before, rows_of_whole
from backprop_kernels.cuda.tensor_map import can_map
from backprop_kernels.cuda.tiles import choose
from backprop_kernels.cuda.transpose import transposed
from backprop_kernels.precisions import PRECISIONS


def linear_dgrad(
    dZ: Array,
    W: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """dZ (batch, out), W (out, in), the layer below → dZ_prev (batch, in), db_prev (in)."""
    return dgrad(None, None, dZ, W, saved, activation, dropout, out)


def dgrad(
    precision: str | None, unscale: Array | None, dZ: Array, W: Array,
    saved: Array | None = None, activation: str = "identity", dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None, dZ_rounded: bool = False,
    dZ_prev_rounded: bool = False, copy: Array | None = None, cell: Array | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """`linear_dgrad` in a precision, or dZ's own. dZ and dZ_prev may be multiplied by a scale:
    `unscale` is its inverse, on the device, and db_prev is the true one.

    In tf32, whether dZ holds rounded numbers, and dZ_prev shall; `copy` (in, batch): dZ_prevᵀ of
    these, as transpose.py has it."""
    checks.linear_dgrad(dZ, W, saved, activation, dropout, out, precision, SAVES_BITS)
    (batch, out_features), in_features = dZ.shape, W.shape[1]
    real = PRECISIONS[precision or str(dZ.dtype)].real
    dZ_prev, db_prev = out or (None, empty((in_features,), real))
    on_device("linear_dgrad", dZ=dZ, W=W, saved=saved, out_dZ_prev=dZ_prev, out_db_prev=db_prev)
    if dZ_prev is None:
        dZ_prev = empty((batch, in_features), dZ.dtype)
    choice = choose(
        "linear_dgrad", rows_of_whole(batch), in_features, out_features,
        precision or str(dZ.dtype), capability(dZ), can_map(dZ, W, dZ_prev),
    )  # fmt: skip
    tile = choice.tile
    fused = copy if choice.along_k else None  # what its epilogue writes; another's follows
    partial = None
    if db_prev is not None:
        adds_up(tile.summed_rows, "a tile of linear_dgrad")
        partial = empty((-(-batch // tile.summed_rows), in_features), real)
    if dZ_prev.size:
        A, B = along_k(choice, dZ, dZ_rounded), down_k(choice, W)
        types = (*choice.types, *result("stored", dZ_prev_rounded, fused))
        launch(
            Unit("linear_dgrad.cu", variant(real, activation, types)), "linear_dgrad",
            grid(choice, batch, in_features, 1, dZ), (tile.threads,),
            *operands(choice, A, B, batch, in_features), saved, unscale,
            written(tile, dZ_prev, fused), partial, batch, in_features, out_features,
            *dropout_arguments(dropout, real), cell, shared=tile.shared,
        )  # fmt: skip
    if copy is not fused:
        transposed(dZ_prev, copy)
    if partial is not None:
        column_sums(partial, db_prev, before=rows_before())
    return dZ_prev, db_prev
