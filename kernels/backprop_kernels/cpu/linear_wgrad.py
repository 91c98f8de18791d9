"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad

dZ (batch, out_features), X (batch, in_features)    read
dW (out_features, in_features)                      written
The product has M = out_features, N = in_features, K = batch.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.product import multiply
from backprop_kernels.cpu.program import scratch


def linear_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    checks.linear_wgrad(dZ, X, out)
    checks.contiguous("linear_wgrad", dZ=dZ, X=X, out=out)
    dW = scratch((dZ.shape[1], X.shape[1]), dZ.dtype) if out is None else out
    multiply(dZ.T, X, dW)
    return dW
