"""Layer norm, forward and backward, with a ReLU below: `make bench-operators`."""

from __future__ import annotations

from typing import Any

from common import Case, measure_operator, norm_cases


def cases(dtype: str) -> list[Case]:
    """Both directions at every shape."""
    return norm_cases(dtype, _forward, _backward, per_row=True)


def _forward(backend: Any, X: Any, gamma: Any, beta: Any, out: Any) -> object:
    return backend.layer_norm_forward(X, gamma, beta, out=out)


def _backward(backend: Any, given: tuple[Any, ...], out: Any) -> object:
    return backend.layer_norm_backward(*given, "relu", out=out)


if __name__ == "__main__":
    measure_operator("layer_norm", __doc__, cases)
