"""linear_wgrad at the layers of bench_step.py: `make bench-operators`."""

from __future__ import annotations

from backprop_kernels import cpu, reference
from common import LAYERS, Case, captured, draw, measure_operator


def cases(dtype: str) -> list[Case]:
    """One per layer."""
    return [_case(*layer, dtype) for layer in LAYERS]


def _case(batch: int, i: int, o: int, dtype: str) -> Case:
    dZ, X, dW = draw(batch, o, dtype=dtype), draw(batch, i, dtype=dtype), draw(o, i, dtype=dtype)
    return Case(
        f"{o} x {batch} x {i}",
        captured(lambda: cpu.linear_wgrad(dZ, X, out=dW)),
        lambda: reference.linear_wgrad(dZ, X),
        2 * batch * i * o,
        (dZ, X, dW),
    )


if __name__ == "__main__":
    measure_operator("linear_wgrad", __doc__, cases)
