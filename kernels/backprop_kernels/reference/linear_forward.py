"""linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.reference.epilogue import epilogue


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
    Z = X @ W.T
    if b is not None:
        Z = Z + b
    return epilogue(Z, activation, dropout, *(out or (None, None)))
