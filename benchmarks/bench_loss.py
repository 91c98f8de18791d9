"""The loss with its gradient and db in one pass: `make bench-operators`."""

from __future__ import annotations

import numpy as np
from backprop_kernels import cpu, reference
from common import Case, captured, draw, measure_operator

# name, batch, outputs
SHAPES = [
    ("cross_entropy", 256, 10), ("cross_entropy", 4096, 10), ("cross_entropy", 4096, 1000),
    ("bce_with_logits", 4096, 1), ("mse", 4096, 1), ("mse", 4096, 256),
]  # fmt: skip


def cases(dtype: str) -> list[Case]:
    """One per loss and shape."""
    return [_case(*shape, dtype) for shape in SHAPES]


def _case(name: str, batch: int, outputs: int, dtype: str) -> Case:
    Z, target = draw(batch, outputs, dtype=dtype), draw(batch, outputs, dtype=dtype, seed=1)
    if name == "cross_entropy":
        target = np.random.default_rng(1).integers(0, outputs, batch)
    elif name == "bce_with_logits":
        target = (target > 0).astype(dtype)
    out = np.zeros(()), draw(batch, outputs, dtype=dtype), draw(outputs, dtype=dtype)
    return Case(
        f"{name} {batch} x {outputs}",
        captured(lambda: cpu.loss(Z, target, name, out=out)),
        lambda: reference.loss(Z, target, name),
        0,
        (Z, target, *out),
    )


if __name__ == "__main__":
    measure_operator("loss", __doc__, cases)
