"""`capture`: turn a function that calls operators into something that replays them."""

from __future__ import annotations

from collections.abc import Callable

from backprop_kernels.arrays import Array


def capture(operators: Callable[..., None], *inputs: Array) -> Callable[..., None]:
    """Plain array code has nothing to prepare: replaying is calling again."""
    return operators
