"""What sparse_input.py does to two rows of X, in vector registers.

A panel has rows of PANEL_REGISTERS vectors, one row for each column of X.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function
from numba.extending import intrinsic

from backprop_kernels.cpu.sparse_input import PANEL_REGISTERS
from backprop_kernels.cpu.vector_loop import Vectors

CHUNK = 64  # elements of X that are looked at together
WORD = ir.IntType(64)


def make_nonzero_bits(dtype: str) -> Any:
    """A Numba intrinsic f(address, count) → int64: bit i says whether element i < count is not 0.

    NaN is not 0. Elements from CHUNK on are not looked at.
    """

    @intrinsic
    def nonzero_bits(context: Any, address: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = Vectors(builder, dtype, CHUNK)
            x = vectors.load(arguments[0], ir.Constant(WORD, 0), vectors.first(arguments[1])).ir
            found = builder.fcmp_unordered("!=", x, ir.Constant(vectors.type, [0.0] * CHUNK))
            return builder.bitcast(found, WORD)

        return types.int64(types.int64, types.int64), generate

    return nonzero_bits


@intrinsic
def first_bit(context: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set, of one or more."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(WORD, [WORD, ir.IntType(1)])
        count = get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(count, [arguments[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.int64), generate


def make_multiply_pair(dtype: str) -> Any:
    """A Numba intrinsic f(positions, values, count, panel, C, c_row, rows, columns).

    Row r < rows of C = Σ values[2n + r] · panel[positions[n]], in this order; only its first
    `columns` elements are touched. c_row: elements from row to row.
    """

    @intrinsic
    def multiply_pair(
        context: Any, positions: Any, values: Any, count: Any, panel: Any, C: Any, c_row: Any,
        rows: Any, columns: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            positions, values, count, panel, C, c_row, rows, columns = arguments
            pair = _Pair(builder, dtype)
            zero = ir.Constant(pair.type, [0.0] * pair.lanes)
            sums = [[alloca_once(builder, pair.type) for _ in pair.places] for _ in range(2)]
            for total in (*sums[0], *sums[1]):
                builder.store(zero, total)
            with for_range(builder, count) as loop:
                offset, xs = pair.nonzero(positions, values, loop.index)
                for j, place in enumerate(pair.places):
                    w = pair.load(panel, builder.add(offset, place)).ir
                    for x, row in zip(xs, sums, strict=True):
                        builder.store(pair.fma(x, w, builder.load(row[j])), row[j])
            for start, mask, r, j in pair.elements(c_row, rows, columns):
                pair.store(builder.load(sums[r][j]), C, start, mask)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return multiply_pair


def make_add_pair(dtype: str) -> Any:
    """A Numba intrinsic f(positions, values, count, D, d_row, rows, panel, columns).

    panel[positions[n]] += Σ over rows r of values[2n + r] · D[r], for every n; only the first
    `columns` elements of D's rows are read, what is beyond counts as 0. d_row: elements from row
    to row.
    """

    @intrinsic
    def add_pair(
        context: Any, positions: Any, values: Any, count: Any, D: Any, d_row: Any, rows: Any,
        panel: Any, columns: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            positions, values, count, D, d_row, rows, panel, columns = arguments
            pair = _Pair(builder, dtype)
            d = [
                pair.load(D, start, mask).ir
                for start, mask, _, _ in pair.elements(d_row, rows, columns)
            ]
            with for_range(builder, count) as loop:
                offset, xs = pair.nonzero(positions, values, loop.index)
                for j, place in enumerate(pair.places):
                    place = builder.add(offset, place)
                    total = pair.load(panel, place).ir
                    for r, x in enumerate(xs):
                        total = pair.fma(x, d[r * PANEL_REGISTERS + j], total)
                    pair.store(total, panel, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return add_pair


class _Pair(Vectors):
    """Two rows, each as wide as a panel."""

    def __init__(self, builder: Any, dtype: str) -> None:
        super().__init__(builder, dtype)
        self.places = [ir.Constant(WORD, j * self.lanes) for j in range(PANEL_REGISTERS)]

    def nonzero(self, positions: Any, values: Any, n: Any) -> tuple[Any, list[Any]]:
        """Where row positions[n] of a panel starts, and values[2n], values[2n + 1] splat."""
        builder = self.builder
        positions = builder.inttoptr(positions, ir.IntType(32).as_pointer())
        values = builder.inttoptr(values, self.scalar.as_pointer())
        position = builder.sext(builder.load(builder.gep(positions, [n])), WORD)
        width = ir.Constant(WORD, PANEL_REGISTERS * self.lanes)
        first = builder.mul(n, ir.Constant(WORD, 2))
        places = [builder.add(first, ir.Constant(WORD, r)) for r in range(2)]
        return builder.mul(position, width), [
            self.splat(builder.load(builder.gep(values, [place]))) for place in places
        ]

    def elements(self, stride: Any, rows: Any, columns: Any) -> list[Any]:
        """(offset, mask, row, register) of each vector of two rows in a matrix."""
        builder, nothing = self.builder, ir.Constant(WORD, 0)
        found = []
        for r in range(2):
            exists = builder.icmp_signed("<", ir.Constant(WORD, r), rows)
            inside = builder.select(exists, columns, nothing)
            for j, place in enumerate(self.places):
                start = builder.add(builder.mul(stride, ir.Constant(WORD, r)), place)
                found.append((start, self.first(builder.sub(inside, place)), r, j))
        return found
