"""Layer norm, forward and backward, with a ReLU below: `make bench-operators`."""

from __future__ import annotations

import numpy as np
from backprop_kernels import cpu, reference
from backprop_kernels.arrays import Array
from common import Case, captured, draw, measure_operator

SHAPES = [(256, 256), (1024, 1024), (4096, 128), (4096, 2048)]  # batch, features


def cases(dtype: str) -> list[Case]:
    """Both directions at every shape."""
    return [case for shape in SHAPES for case in _both(*shape, dtype)]


def _both(batch: int, features: int, dtype: str) -> list[Case]:
    X, dY, saved = (draw(batch, features, dtype=dtype, seed=seed) for seed in range(3))
    gamma, beta = draw(features, dtype=dtype), draw(features, dtype=dtype, seed=1)
    Y, dX = np.empty_like(X), np.empty_like(X)
    mean, rstd = np.empty(batch, dtype), np.ones(batch, dtype)
    db, dgamma = np.empty(features, dtype), np.empty(features, dtype)

    def forward(backend, out):  # type: ignore[no-untyped-def]
        return backend.layer_norm_forward(X, gamma, beta, out=out)

    def backward(backend, out):  # type: ignore[no-untyped-def]
        return backend.layer_norm_backward(dY, X, gamma, mean, rstd, saved, "relu", out=out)

    forward_out, backward_out = (Y, None, mean, rstd), (dX, db, dgamma)
    read: tuple[Array, ...] = (X, gamma, beta)
    return [
        Case(
            f"forward {batch} x {features}",
            captured(lambda: forward(cpu, forward_out)),
            lambda: forward(reference, None),
            0,
            (*read, Y, mean, rstd),
        ),
        Case(
            f"backward {batch} x {features}",
            captured(lambda: backward(cpu, backward_out)),
            lambda: backward(reference, None),
            0,
            (X, dY, gamma, mean, rstd, saved, *backward_out),
        ),
    ]


if __name__ == "__main__":
    measure_operator("layer_norm", __doc__, cases)
