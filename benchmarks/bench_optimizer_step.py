"""One update of the whole arena, finite check and norm included: `make bench-operators`."""

from __future__ import annotations

import numpy as np
from backprop_kernels import cpu, reference
from backprop_kernels.optimizers import OPTIMIZERS
from common import Case, captured, draw, measure_operator

RULES = ("SGD", "Adam", "AdamW")
SIZES = (8_976, 101_392, 1_863_696, 8_417_290)  # parameters of bench_step.py's networks


def cases(dtype: str) -> list[Case]:
    """One per rule and size."""
    return [_case(rule, size, dtype) for rule in RULES for size in SIZES]


def _case(rule: str, size: int, dtype: str) -> Case:
    row = OPTIMIZERS[rule]
    options = {**row.options, "lr": 1e-9}  # so small that nothing diverges
    scalars = np.array([np.inf, *row.scalars(1, **options)])
    P, G = draw(size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    state = tuple(np.abs(draw(size, dtype=dtype, seed=2)) for _ in row.state)
    norm = np.zeros(())
    return Case(
        f"{rule} {size:,}",
        captured(lambda: cpu.optimizer_step(P, G, state, scalars, rule, out=norm)),
        lambda: reference.optimizer_step(P, G, state, scalars, rule),
        0,
        (P, P, G, *state, *state),  # read and written
    )


if __name__ == "__main__":
    measure_operator("optimizer_step", __doc__, cases)
