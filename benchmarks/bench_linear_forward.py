"""linear_forward with ReLU at the layers of bench_step.py: `make bench-operators`."""

from __future__ import annotations

from backprop_kernels import cpu, reference
from common import LAYERS, Case, captured, draw, measure_operator


def cases(dtype: str) -> list[Case]:
    """One per layer."""
    return [_case(*layer, dtype) for layer in LAYERS]


def _case(batch: int, i: int, o: int, dtype: str) -> Case:
    X, W, b = draw(batch, i, dtype=dtype), draw(o, i, dtype=dtype), draw(o, dtype=dtype)
    Y = draw(batch, o, dtype=dtype)
    return Case(
        f"{batch} x {i} x {o}",
        captured(lambda: cpu.linear_forward(X, W, b, "relu", out=(Y, None))),
        lambda: reference.linear_forward(X, W, b, "relu"),
        2 * batch * i * o,
        (X, W, b, Y),
    )


if __name__ == "__main__":
    measure_operator("linear_forward", __doc__, cases)
