"""linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward

The kernel and its contract: linear_forward.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import dropout_arguments, variant
from backprop_kernels.cuda.launch import empty, launch, on_device
from backprop_kernels.cuda.tiles import tiling


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
    on_device("linear_forward", X=X, W=W, b=b, out_Y=Y, out_saved=kept)
    (batch, in_features), out_features = X.shape, len(W)
    if Y is None:
        Y = empty((batch, out_features), X.dtype)
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else empty)
    if Y.size:
        tile, blocks = tiling(X.dtype, batch, out_features)
        launch(
            Unit("linear_forward.cu", variant(X.dtype, activation)), f"linear_forward_{tile.name}",
            (blocks,), (tile.threads,), X, W, b, Y, kept, batch, out_features, in_features,
            *dropout_arguments(dropout, X.dtype),
        )  # fmt: skip
    return Y, saved
