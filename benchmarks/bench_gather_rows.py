"""A shuffled batch gathered from a large array: `make bench-operators`."""

from __future__ import annotations

import numpy as np
from backprop_kernels import cpu, reference
from common import Case, captured, draw, measure_operator

SHAPES = [(1024, 8), (1024, 155), (1024, 784), (256, 4096)]  # rows of a batch, columns
BYTES = 2**28  # of the array they come from


def cases(dtype: str) -> list[Case]:
    """One per width."""
    return [_case(*shape, dtype) for shape in SHAPES]


def _case(batch: int, columns: int, dtype: str) -> Case:
    X = draw(BYTES // columns // np.dtype(dtype).itemsize, columns, dtype=dtype)
    order = np.random.default_rng(0).permutation(len(X))[: len(X) // batch * batch]
    parts = order.reshape(-1, batch)
    index, Y = parts[0].copy(), draw(batch, columns, dtype=dtype)
    gather, turn = captured(lambda: cpu.gather_rows(X, index, out=Y)), 0

    def following() -> None:
        """Other rows each time: the same ones would lie in a cache."""
        nonlocal turn
        turn = (turn + 1) % len(parts)
        index[:] = parts[turn]

    def ours() -> None:
        following()
        gather()

    def numpy() -> None:
        following()
        reference.gather_rows(X, index, out=Y)

    return Case(f"{batch} x {columns}", ours, numpy, 0, (Y, Y))  # read from X, written to Y


if __name__ == "__main__":
    measure_operator("gather_rows", __doc__, cases)
