"""A namespace `m` that carries a bound on the rounding error along with each value.

Any formula of the tables, run on `Bounded` arrays, gives its value in float64 and how far a kernel
that rounds every operation may be from it: each operation adds u |result|, each function
FUNCTION_ULP of the result, and what came in is carried on through the derivative (Higham 2002,
§3.3). Fused multiply-adds only remove roundings. No constant is fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.reference import array_math

FUNCTION_ULP = 2  # of exp, expm1, log, log1p, tanh, erf, sin, cos, on every backend


class Bounded:
    """Numbers and, per element, how far a computed one may be off."""

    __array_ufunc__ = None  # NumPy arrays on the left defer to us

    def __init__(self, value: Any, error: Any, unit: float, tiny: float) -> None:
        self.value, self.error = np.asarray(value), np.asarray(error)
        self.unit, self.tiny = unit, tiny  # roundoff; half the smallest denormal

    @classmethod
    def exact(cls, array: Array) -> Bounded:
        """What a kernel is given: rounded already."""
        info = np.finfo(array.dtype)
        tiny = float(info.smallest_subnormal)
        return cls(array.astype(np.float64), np.zeros(array.shape), float(info.eps) / 2, tiny)

    def like(self, number: Any) -> Bounded:
        """A constant, rounded to the kernel's dtype."""
        if isinstance(number, Bounded):
            return number
        return Bounded(float(number), self.unit * np.abs(number), self.unit, self.tiny)

    def rounded(self, value: Array, error: Array, ulps: float = 0.5) -> Bounded:
        return Bounded(
            value, error + 2 * ulps * self.unit * np.abs(value) + self.tiny, self.unit, self.tiny
        )

    def __add__(self, other: Any) -> Bounded:
        o = self.like(other)
        return self.rounded(self.value + o.value, self.error + o.error)

    def __sub__(self, other: Any) -> Bounded:
        o = self.like(other)
        return self.rounded(self.value - o.value, self.error + o.error)

    def __mul__(self, other: Any) -> Bounded:
        o = self.like(other)
        carried = np.abs(self.value) * o.error + (np.abs(o.value) + o.error) * self.error
        return self.rounded(self.value * o.value, carried)

    def __truediv__(self, other: Any) -> Bounded:
        o = self.like(other)
        quotient = self.value / o.value
        carried = (self.error + np.abs(quotient) * o.error) / (np.abs(o.value) - o.error)
        return self.rounded(quotient, carried)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Bounded:
        return self.like(other) - self

    def __rtruediv__(self, other: Any) -> Bounded:
        return self.like(other) / self

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error, self.unit, self.tiny)

    def _compare(self, other: Any, outcome: Callable[[Array, Array], Array]) -> Any:
        o = self.like(other)
        doubtful = (np.abs(self.value - o.value) <= self.error + o.error) & (
            self.error + o.error > 0
        )
        return self, outcome(self.value, o.value), doubtful

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, np.less)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, np.less_equal)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, np.greater)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, np.greater_equal)


def where(comparison: Any, a: Any, b: Any) -> Bounded:
    """A choice; where the comparison is within its own error, either side may be chosen."""
    model, chosen, doubtful = comparison
    a, b = model.like(a), model.like(b)
    error = np.where(chosen, a.error, b.error)
    either = np.maximum(a.error, b.error) + np.abs(a.value - b.value)
    return Bounded(
        np.where(chosen, a.value, b.value),
        np.where(doubtful, either, error), model.unit, model.tiny,
    )  # fmt: skip


def abs(x: Bounded) -> Bounded:
    return Bounded(np.abs(x.value), x.error, x.unit, x.tiny)


def sign(x: Bounded) -> Bounded:
    return where(x > 0, 1.0, where(x < 0, -1.0, 0.0 * x))


def _function(
    name: str, slope: Callable[[Array], Array], ulps: float = FUNCTION_ULP
) -> Callable[[Bounded], Bounded]:
    """`slope` is monotonic near x, so it is steepest at one end of the interval around x."""
    function = getattr(array_math, name)

    def bounded(x: Bounded) -> Bounded:
        steepest = np.maximum(np.abs(slope(x.value - x.error)), np.abs(slope(x.value + x.error)))
        # Where nothing came in, an infinite slope (sqrt at 0) carries nothing on.
        carried = np.where(x.error == 0, 0, steepest * x.error)
        return x.rounded(function(x.value), carried, ulps)

    return bounded


exp, expm1 = _function("exp", np.exp), _function("expm1", np.exp)
log, log1p = _function("log", lambda x: 1 / x), _function("log1p", lambda x: 1 / (1 + x))
tanh = _function("tanh", lambda x: 1 - np.tanh(x) ** 2)
erf = _function("erf", lambda x: 2 / np.sqrt(pi) * np.exp(-x * x))
sin, cos = _function("sin", np.ones_like), _function("cos", np.ones_like)
sqrt = _function("sqrt", lambda x: 0.5 / np.sqrt(np.maximum(x, 0)), 0.5)
