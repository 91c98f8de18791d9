"""linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.reference.epilogue import through_layer_below, write


def linear_dgrad(
    dZ: Array,
    W: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """dZ (batch, out), W (out, in), the layer below → dZ_prev (batch, in), db_prev (in)."""
    checks.linear_dgrad(dZ, W, saved, activation, dropout, out)
    dZ_prev, db_prev = out or (None, None)
    dZ_prev = write(dZ_prev, through_layer_below(dZ @ W, saved, activation, dropout))
    return dZ_prev, write(db_prev, dZ_prev.sum(axis=0))
