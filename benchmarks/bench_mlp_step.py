"""mlp_step of small networks, layer by layer as a program on a CPU: `make bench-operators`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from backprop_kernels import cpu, reference
from backprop_kernels.arrays import LinearLayer
from common import Case, captured, draw, measure_operator

NETWORKS = [(64, (64, 64, 64, 10)), (1024, (155, 128, 64, 1)), (4096, (64, 64, 64, 64, 10))]


def cases(dtype: str) -> list[Case]:
    """One per network: batch, widths."""
    return [_case(batch, widths, dtype) for batch, widths in NETWORKS]


def _case(batch: int, widths: Sequence[int], dtype: str) -> Case:
    layers, end = [], 0
    for i, o in pairwise(widths):
        layers.append(LinearLayer(i, o, end, end + i * o, "relu"))
        end += (i + 1) * o
    X, target = draw(batch, widths[0], dtype=dtype), draw(batch, widths[-1], dtype=dtype)
    P, G = draw(end, dtype=dtype) / 8, draw(end, dtype=dtype)
    products = 3 * sum(i * o for i, o in pairwise(widths)) - widths[0] * widths[1]
    value = np.zeros(())
    return Case(
        f"{batch} x {'-'.join(map(str, widths))}",
        captured(lambda: cpu.mlp_step(X, target, P, layers, out=(value, G))),
        lambda: reference.mlp_step(X, target, P, layers),
        2 * batch * products,
        (X, target, P, G),
    )


if __name__ == "__main__":
    measure_operator("mlp_step", __doc__, cases)
