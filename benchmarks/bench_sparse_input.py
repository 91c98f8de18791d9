"""sparse_input at the flights' first layer and others, a tenth of X not 0: `make bench-operators`.

Gflop/s are those of the dense product, so that they compare with linear_forward's and
linear_wgrad's; they may exceed the peak.
"""

from __future__ import annotations

import numpy as np
from backprop_kernels import cpu, reference
from common import Case, captured, draw, measure_operator

SHAPES = [(1024, 155, 256), (256, 784, 1024), (1024, 784, 1024)]  # batch, in_features, out_features
NONZERO = 0.1


def cases(dtype: str) -> list[Case]:
    """Forward and the weight gradient of each shape."""
    return [case for shape in SHAPES for case in _cases(*shape, dtype)]


def _cases(batch: int, i: int, o: int, dtype: str) -> list[Case]:
    X, W, b = draw(batch, i, dtype=dtype), draw(o, i, dtype=dtype), draw(o, dtype=dtype)
    X[np.random.default_rng(1).random(X.shape) > NONZERO] = 0
    Y, dZ, dW = draw(batch, o, dtype=dtype), draw(batch, o, dtype=dtype), draw(o, i, dtype=dtype)
    shape, flops = f"{batch} x {i} x {o}", 2 * batch * i * o
    return [
        Case(
            f"forward {shape}",
            captured(lambda: cpu.sparse_input_forward(X, W, b, "relu", out=(Y, None))),
            lambda: reference.sparse_input_forward(X, W, b, "relu"),
            flops,
            (X, W, b, Y),
        ),
        Case(
            f"wgrad {shape}",
            captured(lambda: cpu.sparse_input_wgrad(dZ, X, out=dW)),
            lambda: reference.sparse_input_wgrad(dZ, X),
            flops,
            (X, dZ, dW),
        ),
    ]


if __name__ == "__main__":
    measure_operator("sparse_input", __doc__, cases)
