"""Batch norm, forward and backward, with a ReLU below: `make bench-operators`."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Case, measure_operator, norm_cases


def cases(dtype: str) -> list[Case]:
    """Both directions at every shape."""
    return norm_cases(dtype, _forward, _backward, per_row=False)


def _forward(backend: Any, X: Any, gamma: Any, beta: Any, out: Any) -> object:
    running = np.zeros_like(gamma), np.ones_like(gamma)
    return backend.batch_norm_forward(X, gamma, beta, *running, out=out)


def _backward(backend: Any, given: tuple[Any, ...], out: Any) -> object:
    return backend.batch_norm_backward(*given, "relu", out=out)


if __name__ == "__main__":
    measure_operator("batch_norm", __doc__, cases)
