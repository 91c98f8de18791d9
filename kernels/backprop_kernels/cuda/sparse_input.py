"""sparse_input: linear_forward and linear_wgrad, where most of X is 0.

Here the zeros are multiplied too, by the kernels of those two operators.
docs/derivations.md#sparse_input
"""

from __future__ import annotations

from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.linear_forward import linear_forward
from backprop_kernels.cuda.linear_wgrad import linear_wgrad


def sparse_input_forward(
    X: Array,
    W: Array,
    b: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """X (batch, in), W (out, in), b (out) → Y (batch, out) and what backward needs (Y, Z, None)."""
    return linear_forward(X, W, b, activation, dropout, out)


def sparse_input_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    return linear_wgrad(dZ, X, out)
