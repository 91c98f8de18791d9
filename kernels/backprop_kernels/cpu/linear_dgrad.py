"""linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad

dZ (batch, out_features), W (out_features, in_features), saved (batch, in_features)    read
dZ_prev (batch, in_features), db_prev (in_features)                                    written
Fused: the layer below's dropout mask, activation derivative and bias gradient.
The product has M = batch, N = in_features, K = out_features.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu.epilogue import backward_epilogue
from backprop_kernels.cpu.product import multiply
from backprop_kernels.cpu.program import scratch


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
    dZ_prev, db_prev = out or (None, scratch(W.shape[1], dZ.dtype))
    checks.contiguous(
        "linear_dgrad", dZ=dZ, W=W, saved=saved, out_dZ_prev=dZ_prev, out_db_prev=db_prev
    )
    if dZ_prev is None:
        dZ_prev = scratch((len(dZ), W.shape[1]), dZ.dtype)
    epilogue, finish = backward_epilogue(dZ_prev, saved, activation, dropout, db_prev)
    multiply(dZ, W, dZ_prev, epilogue, finish)
    return dZ_prev, db_prev
