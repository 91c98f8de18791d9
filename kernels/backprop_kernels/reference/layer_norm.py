"""layer_norm: statistics over the features of each row.  docs/derivations.md#layer_norm"""

from __future__ import annotations

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.reference.epilogue import epilogue, through_layer_below, write


def layer_norm_forward(
    X: Array,
    gamma: Array,
    beta: Array,
    eps: float = 1e-5,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None, Array | None] | None = None,
    centred: bool = True,
) -> tuple[Array, Array | None, Array, Array]:
    """X (batch, features) → Y, saved, mean (batch), rstd (batch).

    Not `centred`, it is RMS norm: the mean is taken as 0, so that rstd = 1/√(mean X² + eps).
    """
    checks.norm_forward("layer_norm_forward", X, gamma, beta, activation, dropout, out, len(X))
    features = max(X.shape[1], 1)
    mean = X.sum(axis=1) / features if centred else np.zeros(len(X), X.dtype)
    deviation = X - mean[:, None]
    rstd = 1 / np.sqrt((deviation * deviation).sum(axis=1) / features + X.real.dtype.type(eps))
    given = out or (None, None, None, None)
    Z = deviation * rstd[:, None] * gamma + beta
    Y, saved = epilogue(Z, activation, dropout, given[0], given[1])
    return Y, saved, write(given[2], mean), write(given[3], rstd)


def layer_norm_backward(
    dZ: Array,
    X: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
    centred: bool = True,
) -> tuple[Array, Array, Array]:
    """dZ (batch, features), the layer below → dZ_prev, db_prev, dgamma (dbeta is dZ's own db)."""
    checks.norm_backward(
        "layer_norm_backward", dZ, X, gamma, mean, rstd, saved, activation, dropout, out, len(X)
    )
    features = max(X.shape[1], 1)
    X_hat = (X - mean[:, None]) * rstd[:, None]
    dX_hat = dZ * gamma
    shift = dX_hat.sum(axis=1, keepdims=True) / features if centred else 0
    slope = (dX_hat * X_hat).sum(axis=1, keepdims=True) / features
    dX = rstd[:, None] * (dX_hat - shift - X_hat * slope)
    given = out or (None, None, None)
    dZ_prev = write(given[0], through_layer_below(dX, saved, activation, dropout))
    return dZ_prev, write(given[1], dZ_prev.sum(axis=0)), write(given[2], (dZ * X_hat).sum(axis=0))
