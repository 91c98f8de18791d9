"""linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward

X (batch, in_features), W (out_features, in_features), b (out_features)          read
Y, saved (batch, out_features)                                                   written
Fused: bias, activation and dropout leave with the product. Saved: Y or Z, as the activation
table says; Y itself where that is enough.
The product has M = batch, N = out_features, K = in_features; W is packed, X is read as it lies;
with few outputs it is dot products.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu.epilogue import forward_epilogue
from backprop_kernels.cpu.narrow_product import is_narrow, multiply_narrow
from backprop_kernels.cpu.product import multiply
from backprop_kernels.cpu.program import scratch


def linear_forward(
    X: Array,
    W: Array,
    b: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """X (batch, in), W (out, in), b (out) → Y (batch, out) and what backward needs (Y, Z, None)."""
    checks.linear_forward(X, W, b, activation, dropout, out)
    Y, kept = out or (None, None)
    checks.contiguous("linear_forward", X=X, W=W, b=b, out_Y=Y, out_saved=kept)
    if Y is None:
        Y = scratch((len(X), len(W)), X.dtype)
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else scratch)
    epilogue = forward_epilogue(Y, b, activation, dropout, kept)
    if is_narrow(W):
        multiply_narrow(X, W, Y, epilogue)
    else:
        multiply(X, W.T, Y, epilogue)
    return Y, saved
