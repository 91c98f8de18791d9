"""The types that every backend shares: `Array`, `Dropout` and `LinearLayer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

# NumPy or CuPy. Operators are typed by behaviour, not by library: dispatch refuses the rest.
Array: TypeAlias = Any


class Dropout(NamedTuple):
    """Which elements a layer drops, as a pure function of (seed, step, layer, element).

    The mask is Philox4x32-10 of those four, so backward computes it again instead of storing it,
    and no thread count or order of work can change it. Kept elements are scaled by 1/(1 − rate).
    """

    rate: float
    stream: Array  # int64 (2,): seed, step. An array, so that a captured program sees new steps.
    layer: int


@dataclass(frozen=True)
class LinearLayer:
    """One layer of a whole network, and where its tensors begin in the flat parameters."""

    in_features: int
    out_features: int
    weight: int
    bias: int | None
    activation: str
