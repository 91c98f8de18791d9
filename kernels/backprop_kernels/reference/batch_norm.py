"""batch_norm: statistics over the batch.  docs/derivations.md#batch_norm"""

from __future__ import annotations

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.reference.epilogue import epilogue, through_layer_below, write


def batch_norm_forward(
    X: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None, Array, Array]:
    """X (batch, features) → Y, saved, mean (features), rstd (features).

    Training uses the batch's mean and biased variance, and moves running_mean and running_var
    (unbiased, as PyTorch does) towards them by `momentum`; else the running ones are used.
    """
    checks.norm_forward(
        "batch_norm_forward", X, gamma, beta, activation, dropout, out, X.shape[1],
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    if training and len(X):
        mean = X.mean(axis=0)
        var = np.square(X - mean).mean(axis=0)
        unbiased = var * X.dtype.type(len(X) / max(len(X) - 1, 1))
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (unbiased - running_var)
    else:
        mean, var = running_mean.copy(), running_var
    rstd = 1 / np.sqrt(var + X.dtype.type(eps))
    given = out or (None, None, None, None)
    Y, saved = epilogue((X - mean) * rstd * gamma + beta, activation, dropout, given[0], given[1])
    return Y, saved, write(given[2], mean), write(given[3], rstd)


def batch_norm_backward(
    dZ: Array,
    X: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array, Array]:
    """dZ (batch, features), the layer below → dZ_prev, db_prev, dgamma (dbeta is dZ's own db)."""
    checks.norm_backward(
        "batch_norm_backward", dZ, X, gamma, mean, rstd, saved, activation, dropout, out, X.shape[1]
    )
    X_hat = (X - mean) * rstd
    dgamma = (dZ * X_hat).sum(axis=0)
    n = max(len(X), 1)
    dX = gamma * rstd * (dZ - dZ.sum(axis=0) / n - X_hat * dgamma / n)
    given = out or (None, None, None)
    dZ_prev = write(given[0], through_layer_below(dX, saved, activation, dropout))
    return dZ_prev, write(given[1], dZ_prev.sum(axis=0)), write(given[2], dgamma)
