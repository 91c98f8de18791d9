"""A formula over whole arrays, one vector register after another, the tail under a mask.

LLVM's own vectoriser would check pointers for overlap before every row of a block and prefers half
of an AVX-512 register; what runs behind every product is laid out by hand instead. A lane's bits
do not depend on where it stands, so no partition of the work changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from backprop_kernels.cpu.ir import Value
from backprop_kernels.cpu.tile import host_shape

WORD = ir.IntType(64)
WHERE = ir.IntType(32)


class Vectors:
    """Loads and stores of one vector type at element offsets, whole or under a mask.

    `lanes`: where it is not a register, but several.
    """

    def __init__(self, builder: Any, dtype: str, lanes: int | None = None) -> None:
        self.builder = builder
        self.lanes = lanes or host_shape().lanes(dtype)
        self.size = 4 if dtype == "float32" else 8
        self.scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.mask_type = ir.VectorType(ir.IntType(1), self.lanes)
        self.suffix = f"v{self.lanes}f{8 * self.size}.p0"

    def place(self, base: Any, offset: Any) -> Any:
        start = self.builder.inttoptr(base, self.scalar.as_pointer())
        place = self.builder.gep(start, [offset])
        return self.builder.bitcast(place, self.type.as_pointer())

    def load(self, base: Any, offset: Any, mask: Any = None) -> Value:
        place = self.place(base, offset)
        if mask is None:
            value = self.builder.load(place)
            value.align = self.size
            return Value(self.builder, value)
        kind = ir.FunctionType(self.type, [place.type, WHERE, self.mask_type, self.type])
        name = f"llvm.masked.load.{self.suffix}"
        function = get_or_insert_function(self.builder.module, kind, name)
        zero = ir.Constant(self.type, [0.0] * self.lanes)
        alignment = ir.Constant(WHERE, self.size)
        return Value(self.builder, self.builder.call(function, [place, alignment, mask, zero]))

    def store(self, value: Any, base: Any, offset: Any, mask: Any = None) -> None:
        place = self.place(base, offset)
        if mask is None:
            self.builder.store(value, place).align = self.size
            return
        kind = ir.FunctionType(ir.VoidType(), [self.type, place.type, WHERE, self.mask_type])
        name = f"llvm.masked.store.{self.suffix}"
        function = get_or_insert_function(self.builder.module, kind, name)
        self.builder.call(function, [value, place, ir.Constant(WHERE, self.size), mask])

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(WHERE, 0))
        zeros = ir.Constant(ir.VectorType(WHERE, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a · b + c, rounded once where the CPU can."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.size}"
        return self.builder.call(get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def sum(self, value: Any) -> Any:
        """The sum of all lanes: halves are added until one number is left."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            halves = (
                ir.Constant(ir.VectorType(WHERE, lanes), list(range(low, low + lanes)))
                for low in (0, lanes)
            )
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (self.builder.shuffle_vector(value, undefined, half) for half in halves)
            value = self.builder.fadd(low, high)
        return self.builder.extract_element(value, ir.Constant(WHERE, 0))

    def first(self, count: Any) -> Any:
        """The mask of the first `count` lanes."""
        steps = ir.Constant(ir.VectorType(WORD, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", steps, self.splat(count))


def each(builder: Any, count: Any, vectors: Vectors, body: Callable[[Any, Any], None]) -> None:
    """body(offset, None) for every whole vector, then body(offset, mask) for a tail."""
    lanes = vectors.lanes
    whole = builder.sub(count, builder.srem(count, ir.Constant(WORD, lanes)))
    before = builder.block
    loop, after = builder.append_basic_block("vectors"), builder.append_basic_block("tail")
    builder.cbranch(builder.icmp_signed(">", whole, ir.Constant(WORD, 0)), loop, after)
    builder.position_at_end(loop)
    offset = builder.phi(WORD)
    body(offset, None)
    following = builder.add(offset, ir.Constant(WORD, lanes))
    builder.cbranch(builder.icmp_signed("<", following, whole), loop, after)
    offset.add_incoming(ir.Constant(WORD, 0), before)
    offset.add_incoming(following, builder.block)
    builder.position_at_end(after)
    with builder.if_then(builder.icmp_signed("<", whole, count)):
        body(whole, vectors.first(builder.sub(count, whole)))


def vector_loop(formula: Callable[..., Any], dtype: str, inputs: int, scalars: int = 0) -> Any:
    """A Numba intrinsic run(addresses, scalars, count): formula over `count` elements.

    `addresses` is a tuple of int64: `inputs` arrays that are read, then those that are written.
    formula(*inputs, *scalars) takes `Value`s and returns one per array written, in order. An array
    may be both; no other overlap is allowed.
    """

    @intrinsic
    def run(typing_context: Any, addresses: Any, constants: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = Vectors(builder, dtype)
            places = [builder.extract_value(arguments[0], i) for i in range(addresses.count)]
            extra = [
                Value(builder, vectors.splat(builder.extract_value(arguments[1], i)))
                for i in range(scalars)
            ]

            def body(offset: Any, mask: Any) -> None:
                values = [vectors.load(p, offset, mask) for p in places[:inputs]]
                results = formula(*values, *extra)
                for place, value in zip(places[inputs:], results, strict=True):
                    vectors.store(values[0].constant(value).ir, place, offset, mask)

            each(builder, arguments[2], vectors, body)
            return context.get_dummy_value()

        return types.void(addresses, constants, types.int64), generate

    return run


def sum_of_squares(dtype: str) -> Any:
    """A Numba intrinsic f(address, count) → Σ x² in float64, the order fixed by `count` alone."""

    @intrinsic
    def run(typing_context: Any, address: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, count = arguments
            vectors = Vectors(builder, dtype)
            wide = ir.VectorType(ir.DoubleType(), vectors.lanes)
            zero = ir.Constant(wide, [0.0] * vectors.lanes)
            slot = builder.alloca(wide)
            builder.store(zero, slot)

            def body(offset: Any, mask: Any) -> None:
                value = vectors.load(address, offset, mask).ir
                if dtype == "float32":
                    value = builder.fpext(value, wide)
                total = builder.fadd(builder.load(slot), builder.fmul(value, value))
                builder.store(total, slot)

            each(builder, count, vectors, body)
            kind = ir.FunctionType(ir.DoubleType(), [ir.DoubleType(), wide])
            reduce = get_or_insert_function(
                builder.module, kind, f"llvm.vector.reduce.fadd.v{vectors.lanes}f64"
            )
            return builder.call(reduce, [ir.Constant(ir.DoubleType(), 0.0), builder.load(slot)])

        return types.float64(types.int64, types.int64), generate

    return run
