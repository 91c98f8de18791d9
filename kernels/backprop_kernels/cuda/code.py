"""C++ text from the formulas of the tables: this module is the namespace `m` that writes it.

A formula runs once, on `Value`s, and each step becomes a statement; what occurs twice is computed
once. Nothing depends on the dtype but `using real`: literals are `real(0.5)`, so that no float64
instruction gets into a float32 kernel, and the functions are overloaded. NaN passes through, as a
comparison with it is false on every side.

Accuracy of a function on a GPU: add, multiply, divide, sqrt correctly rounded; exp, expm1, log,
log1p, tanh, erf within 2 ulp by NVIDIA's table (CUDA C++ Programming Guide, "Mathematical
Functions"; without fast math, denormals kept); sin and cos by `sine.cuh`, 2 ulp up to |x| = 1e5
(float32) or 1e9 (float64), as CUDA's own need float64 and local memory to reduce larger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Real
from typing import Any

from backprop_kernels.errors import KindError

__all__ = [
    "abs",
    "cos",
    "erf",
    "exp",
    "expm1",
    "function",
    "log",
    "log1p",
    "sign",
    "sin",
    "sqrt",
    "tanh",
    "variant",
    "where",
]


class _Body:
    """The statements of one function; an expression that is there already keeps its name."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}  # by the expression that each holds

    def value(self, expression: str, kind: str = "real") -> Value:
        return self.values.setdefault(expression, Value(self, f"v{len(self.values)}", kind))

    def statements(self) -> list[str]:
        return [f"const {v.kind} {v.name} = {text};" for text, v in self.values.items()]


class Value:
    """A variable of the function being written: a number, or the outcome of a comparison.

    Raises:
        KindError: a formula branches on a value, or mixes in what is no number.
    """

    __slots__ = ("body", "kind", "name")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, body: _Body, name: str, kind: str = "real") -> None:
        self.body, self.name, self.kind = body, name, kind

    def _binary(self, left: Any, operator: str, right: Any, kind: str = "real") -> Value:
        return self.body.value(f"{_text(left)} {operator} {_text(right)}", kind)

    def __add__(self, other: Any) -> Value:
        return self._binary(self, "+", other)

    def __radd__(self, other: Any) -> Value:
        return self._binary(other, "+", self)

    def __sub__(self, other: Any) -> Value:
        return self._binary(self, "-", other)

    def __rsub__(self, other: Any) -> Value:
        return self._binary(other, "-", self)

    def __mul__(self, other: Any) -> Value:
        return self._binary(self, "*", other)

    def __rmul__(self, other: Any) -> Value:
        return self._binary(other, "*", self)

    def __truediv__(self, other: Any) -> Value:
        return self._binary(self, "/", other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._binary(other, "/", self)

    def __pow__(self, other: Any) -> Value:
        if not isinstance(other, Value) and other == 0.5:
            return self.body.value(f"sqrt({_text(self)})")
        return self.body.value(f"pow({_text(self)}, {_text(other)})")

    def __rpow__(self, other: Any) -> Value:
        return self.body.value(f"pow({_text(other)}, {_text(self)})")

    def __neg__(self) -> Value:
        return self.body.value(f"-{_text(self)}")

    def __lt__(self, other: Any) -> Value:
        return self._binary(self, "<", other, "bool")

    def __le__(self, other: Any) -> Value:
        return self._binary(self, "<=", other, "bool")

    def __gt__(self, other: Any) -> Value:
        return self._binary(self, ">", other, "bool")

    def __ge__(self, other: Any) -> Value:
        return self._binary(self, ">=", other, "bool")

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._binary(self, "==", other, "bool")

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return self._binary(self, "!=", other, "bool")

    def __bool__(self) -> bool:
        raise KindError("formula: condition: expected no branch on a value; use m.where")


def _text(operand: Any) -> str:
    """A number as it stands in an expression."""
    if isinstance(operand, Value):
        if operand.kind != "real":
            raise KindError("formula: operand: expected a number, got a comparison; use m.where")
        return operand.name
    if not isinstance(operand, Real) or isinstance(operand, bool) or not isfinite(operand):
        raise KindError(f"formula: constant: expected a finite number, got {operand!r}")
    return f"real({float(operand)!r})"


def where(condition: Value, a: Any, b: Any) -> Value:
    """`a` where `condition` holds, else `b`."""
    if not isinstance(condition, Value) or condition.kind != "bool":
        raise KindError("formula: condition: expected a comparison of values")
    return condition.body.value(f"{condition.name} ? {_text(a)} : {_text(b)}")


def sign(x: Value) -> Value:
    """−1, 0 or 1; NaN for NaN."""
    return where(x > 0, 1.0, where(x < 0, -1.0, x))


def _call(cuda: str, *more: str) -> Callable[[Value], Value]:
    """A function of CUDA's, overloaded for float and double."""
    return lambda x: x.body.value(f"{cuda}({', '.join([_text(x), *more])})")


abs, sqrt = _call("fabs"), _call("sqrt")
exp, expm1, log, log1p = _call("exp"), _call("expm1"), _call("log"), _call("log1p")
tanh, erf = _call("tanh"), _call("erf")
sin, cos = _call("sine", "0"), _call("sine", "1")


def function(name: str, parameters: Sequence[str], formula: Callable[..., Any]) -> str:
    """The text of a device function with the given parameter names.

    `real name(real p0, …)` where the formula gives one number; where it gives a tuple,
    `void name(real p0, …, real& r0, real& r1, …)`.
    """
    body = _Body()
    result = formula(*(Value(body, parameter) for parameter in parameters))
    arguments = [f"real {parameter}" for parameter in parameters]
    if isinstance(result, tuple):
        ends = [f"r{i} = {_text(value)};" for i, value in enumerate(result)]
        arguments += [f"real& r{i}" for i in range(len(result))]
    else:
        ends = [f"return {_text(result)};"]
    head = f"DEVICE {'void' if isinstance(result, tuple) else 'real'} {name}"
    lines = [f"    {line}" for line in [*body.statements(), *ends]]
    return "\n".join([f"{head}({', '.join(arguments)}) {{", *lines, "}", ""])


def variant(dtype: Any, *functions: str, types: Sequence[str] = (), **constants: int) -> str:
    """The text of variant.cuh: what one compilation of a kernel file is made for.

    `types` are the lines that say what lies in memory, where that is not `real`.
    """
    real = {"float32": "float", "float64": "double"}[str(dtype)]
    lines = ['#include "ptx.cuh"', f"using real = {real};", '#include "sine.cuh"']
    lines += types or ["using stored = real;"]
    lines += [f"constexpr int {name} = {int(value)};" for name, value in constants.items()]
    return "\n".join([*lines, "", *functions])
