"""linear_dgrad through a ReLU below at the layers of bench_step.py: `make bench-operators`."""

from __future__ import annotations

from backprop_kernels import cpu, reference
from common import LAYERS, Case, captured, draw, measure_operator


def cases(dtype: str) -> list[Case]:
    """One per layer."""
    return [_case(*layer, dtype) for layer in LAYERS]


def _case(batch: int, i: int, o: int, dtype: str) -> Case:
    dZ, W, saved = draw(batch, o, dtype=dtype), draw(o, i, dtype=dtype), draw(batch, i, dtype=dtype)
    out = draw(batch, i, dtype=dtype), draw(i, dtype=dtype)
    return Case(
        f"{batch} x {o} x {i}",
        captured(lambda: cpu.linear_dgrad(dZ, W, saved, "relu", out=out)),
        lambda: reference.linear_dgrad(dZ, W, saved, "relu"),
        2 * batch * i * o,
        (dZ, W, saved, *out),
    )


if __name__ == "__main__":
    measure_operator("linear_dgrad", __doc__, cases)
