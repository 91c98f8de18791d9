"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.reference.epilogue import write


def linear_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    checks.linear_wgrad(dZ, X, out)
    return write(out, dZ.T @ X)
