"""LLVM values that read like arithmetic, so one Python formula becomes kernel code.

A formula written with operators and the functions below runs once, at compile time, on `Value`
objects; each step appends an instruction. The same formula serves a scalar in a loop that LLVM
vectorises and a whole register (`<16 x float>`) in a hand-laid tile. Nothing here sets a fast-math
flag or names a target: the instructions mean the same, bit for bit, on every lane.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from backprop_kernels.errors import KindError


class Value:
    """One LLVM value, scalar or vector, and the builder that its operations append to.

    It holds floats (float32 or float64), integers as wide (`bits`) or the booleans of a comparison.
    Python numbers on either side of an operator become constants of the value's own type.

    Raises:
        KindError: the operands differ in type, or a formula branches on a value.
    """

    __slots__ = ("builder", "compared", "ir")

    def __init__(
        self, builder: ir.IRBuilder, value: ir.Value, compared: Value | None = None
    ) -> None:
        self.builder = builder
        self.ir = value
        self.compared = compared  # of a boolean: gives the type in `where(z > 0, 1.0, 0.0)`

    @property
    def element(self) -> ir.Type:
        """LLVM type of one lane."""
        return _element(self.ir.type)

    @property
    def is_float(self) -> bool:
        """Whether the lanes are float32 or float64."""
        return isinstance(self.element, ir.FloatType | ir.DoubleType)

    def constant(self, number: Any) -> Value:
        """Return `number` in this value's type, in every lane; a `Value` must have that type."""
        if isinstance(number, Value):
            if number.ir.type != self.ir.type:
                raise KindError(
                    f"formula: operands: expected one type, got {self.ir.type} and {number.ir.type}"
                )
            return number
        kind: Any = Real if self.is_float else Integral
        if not isinstance(number, kind):
            expected = "a number" if self.is_float else "an integer"
            raise KindError(f"formula: constant: expected {expected}, got {number!r}")
        converted = float(number) if self.is_float else int(number)
        return Value(self.builder, ir.Constant(self.ir.type, converted))

    def _binary(self, left: Any, right: Any, on_float: str | None, on_integer: str | None) -> Value:
        name = on_float if self.is_float else on_integer
        if name is None:
            expected = "an integer" if self.is_float else "a float"
            raise KindError(
                f"formula: operand: expected {expected} for this operator, got {self.element}"
            )
        a, b = self.constant(left), self.constant(right)
        return Value(self.builder, getattr(self.builder, name)(a.ir, b.ir), self.compared)

    def __add__(self, other: Any) -> Value:
        return self._binary(self, other, "fadd", "add")

    def __radd__(self, other: Any) -> Value:
        return self._binary(other, self, "fadd", "add")

    def __sub__(self, other: Any) -> Value:
        return self._binary(self, other, "fsub", "sub")

    def __rsub__(self, other: Any) -> Value:
        return self._binary(other, self, "fsub", "sub")

    def __mul__(self, other: Any) -> Value:
        return self._binary(self, other, "fmul", None)

    def __rmul__(self, other: Any) -> Value:
        return self._binary(other, self, "fmul", None)

    def __truediv__(self, other: Any) -> Value:
        return self._binary(self, other, "fdiv", None)

    def __rtruediv__(self, other: Any) -> Value:
        return self._binary(other, self, "fdiv", None)

    def __neg__(self) -> Value:
        return Value(self.builder, self.builder.fneg(self.ir))

    def __and__(self, other: Any) -> Value:
        return self._binary(self, other, None, "and_")

    def __or__(self, other: Any) -> Value:
        return self._binary(self, other, None, "or_")

    def __xor__(self, other: Any) -> Value:
        return self._binary(self, other, None, "xor")

    def __lshift__(self, count: int) -> Value:
        return self._binary(self, count, None, "shl")

    def __rshift__(self, count: int) -> Value:
        """Shift in zeros: AVX2 has no arithmetic shift of 64-bit lanes."""
        return self._binary(self, count, None, "lshr")

    def _compare(self, predicate: str, other: Any) -> Value:
        right = self.constant(other).ir
        if not self.is_float:
            compare = self.builder.icmp_unsigned
        elif predicate == "!=":  # the one IEEE comparison that holds for NaN
            compare = self.builder.fcmp_unordered
        else:
            compare = self.builder.fcmp_ordered
        return Value(self.builder, compare(predicate, self.ir, right), compared=self)

    def __lt__(self, other: Any) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compare(">=", other)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return self._compare("!=", other)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise KindError("formula: condition: expected no branch on a value; use m.where")

    @property
    def bits(self) -> Value:
        """The IEEE bits as an integer of the same width."""
        width = 32 if isinstance(self.element, ir.FloatType) else 64
        kind = _shaped(self.ir.type, ir.IntType(width))
        return Value(self.builder, self.builder.bitcast(self.ir, kind))

    def as_float(self) -> Value:
        """Read an integer's bits as the float of the same width."""
        kind = ir.FloatType() if self.element.width == 32 else ir.DoubleType()
        return Value(self.builder, self.builder.bitcast(self.ir, _shaped(self.ir.type, kind)))


def where(condition: Value, a: Any, b: Any) -> Value:
    """Return `a` where `condition` holds, else `b`; two numbers take the type it compared."""
    model = next((x for x in (a, b, condition.compared) if isinstance(x, Value)), condition)
    chosen = condition.builder.select(condition.ir, model.constant(a).ir, model.constant(b).ir)
    return Value(condition.builder, chosen)


def abs(x: Value) -> Value:
    """Return `x` with its sign bit cleared."""
    return _call("fabs", x)


def sqrt(x: Value) -> Value:
    """Return the correctly rounded square root."""
    return _call("sqrt", x)


def copysign(magnitude: Any, sign: Value) -> Value:
    """Return `magnitude` with the sign bit of `sign`."""
    return _call("copysign", magnitude, sign)


def fma(a: Any, b: Any, c: Any) -> Value:
    """Return `a * b + c` rounded once, on every target; slow where there is no FMA."""
    return _call("fma", a, b, c)


def muladd(a: Any, b: Any, c: Any) -> Value:
    """Return `a * b + c`, rounded once where the target has FMA and twice where it has not."""
    return _call("fmuladd", a, b, c)


def inline(function: Callable[..., Any], n_args: int) -> Any:
    """Make `function` of `Value`s callable from Numba code, where its instructions go inline.

    Args:
        function: takes `n_args` scalar `Value`s of one float type; returns one, or a number.
        n_args: how many.

    Returns:
        A Numba intrinsic on `n_args` scalars, all float32 or all float64, which is also the type of
        the result. Other arguments fail to type.
    """

    def definition(typing_context: Any, *kinds: Any) -> Any:
        if kinds[0] not in (types.float32, types.float64) or len(set(kinds)) != 1:
            raise TypingError(
                f"elementwise: arguments: expected {n_args} float32 or {n_args} float64 scalars, "
                f"got {', '.join(map(str, kinds))}; give constants the type of the arrays"
            )

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            values = [Value(builder, argument) for argument in arguments]
            return values[0].constant(function(*values)).ir

        return kinds[0](*kinds), generate

    # Numba reads the arity from the signature; it would pack `*kinds` into one tuple.
    definition.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ["typing_context", *(f"x{i}" for i in range(n_args))]
        ]
    )
    return intrinsic(definition)


def _element(kind: ir.Type) -> ir.Type:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _shaped(kind: ir.Type, element: ir.Type) -> ir.Type:
    """`element` in as many lanes as `kind` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _call(name: str, *operands: Any) -> Value:
    """Call the LLVM intrinsic `name`, which every target lowers on scalars and vectors."""
    model = next(x for x in operands if isinstance(x, Value))
    values = [model.constant(x) for x in operands]
    builder, kind = model.builder, model.ir.type
    lanes = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    suffix = f"{lanes}{_element(kind).intrinsic_name}"
    signature = ir.FunctionType(kind, [kind] * len(values))
    callee = builder.module.declare_intrinsic(f"llvm.{name}.{suffix}", fnty=signature)
    return Value(builder, builder.call(callee, [v.ir for v in values]))
