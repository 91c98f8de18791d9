"""What sparse_input.py does to a few rows of X, in vector registers.

A panel has rows of PANEL_REGISTERS vectors, one row for each column of X and one more. Entry n of
several rows often has the same column, as all columns without zeros do: then their row of the panel
is touched once.
"""

from __future__ import annotations

from functools import reduce
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function
from numba.extending import intrinsic

from backprop_kernels.cpu.sparse_input import PANEL_REGISTERS
from backprop_kernels.cpu.tile import host_shape
from backprop_kernels.cpu.vector_loop import Vectors

CHUNK = 64  # elements of X that are looked at together
WORD = ir.IntType(64)
# Rows that go together: their sums fill half of the registers.
ROWS = 2 if host_shape().vector_bytes == 32 else 4


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


def make_multiply_rows(dtype: str) -> Any:
    """A Numba intrinsic f(entries, stride, count, panel, C, c_row, rows, columns).

    Row r < rows ≤ ROWS of C = Σ over n < count of value[r, n] · panel[column[r, n]], in this order;
    only its first `columns` elements are touched. stride, c_row: from row to row, in bytes of
    entries and in elements of C.
    """

    @intrinsic
    def multiply_rows(
        context: Any, entries: Any, stride: Any, count: Any, panel: Any, C: Any, c_row: Any,
        rows: Any, columns: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            entries, stride, count, panel, C, c_row, rows, columns = arguments
            few = _Rows(builder, dtype, entries, stride, rows)
            zero = ir.Constant(few.type, [0.0] * few.lanes)
            sums = [[alloca_once(builder, few.type) for _ in few.places] for _ in range(ROWS)]
            for total in chain(*sums):
                builder.store(zero, total)
            with for_range(builder, count) as loop:
                offsets, xs = few.entry(loop.index)
                with builder.if_else(few.same(offsets)) as (same, others):
                    with same:
                        for j, place in enumerate(few.places):
                            w = few.load(panel, builder.add(offsets[0], place)).ir
                            for x, row in zip(xs, sums, strict=True):
                                builder.store(few.fma(x, w, builder.load(row[j])), row[j])
                    with others:
                        for offset, x, row in zip(offsets, xs, sums, strict=True):
                            for j, place in enumerate(few.places):
                                w = few.load(panel, builder.add(offset, place)).ir
                                builder.store(few.fma(x, w, builder.load(row[j])), row[j])
            for start, mask, r, j in few.elements(c_row, columns):
                few.store(builder.load(sums[r][j]), C, start, mask)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return multiply_rows


def make_add_rows(dtype: str) -> Any:
    """A Numba intrinsic f(entries, stride, count, D, d_row, rows, panel, columns).

    panel[column[r, n]] += value[r, n] · D[r] for every n < count and r < rows ≤ ROWS, the rows of
    a column in order; only the first `columns` elements of D's rows are read, what is beyond counts
    as 0. stride, d_row: from row to row, in bytes of entries and in elements of D.
    """

    @intrinsic
    def add_rows(
        context: Any, entries: Any, stride: Any, count: Any, D: Any, d_row: Any, rows: Any,
        panel: Any, columns: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            entries, stride, count, D, d_row, rows, panel, columns = arguments
            few = _Rows(builder, dtype, entries, stride, rows)
            d: list[list[Any]] = [[] for _ in range(ROWS)]
            for start, mask, r, _ in few.elements(d_row, columns):
                d[r].append(few.load(D, start, mask).ir)
            with for_range(builder, count) as loop:
                offsets, xs = few.entry(loop.index)
                with builder.if_else(few.same(offsets)) as (same, others):
                    with same:
                        for j, place in enumerate(few.places):
                            at = builder.add(offsets[0], place)
                            total = few.load(panel, at).ir
                            for x, row in zip(xs, d, strict=True):
                                total = few.fma(x, row[j], total)
                            few.store(total, panel, at)
                    with others:
                        for offset, x, row in zip(offsets, xs, d, strict=True):
                            for j, place in enumerate(few.places):
                                at = builder.add(offset, place)
                                few.store(few.fma(x, row[j], few.load(panel, at).ir), panel, at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return add_rows


class _Rows(Vectors):
    """Up to ROWS rows of entries, and as many of a matrix, each as wide as a panel.

    Rows that do not exist have the entries of the first with value 0.
    """

    def __init__(self, builder: Any, dtype: str, entries: Any, stride: Any, rows: Any) -> None:
        super().__init__(builder, dtype)
        self.places = [ir.Constant(WORD, j * self.lanes) for j in range(PANEL_REGISTERS)]
        self._numbers = [ir.Constant(WORD, r) for r in range(ROWS)]
        self._exist = [builder.icmp_signed("<", r, rows) for r in self._numbers]
        nothing = ir.Constant(WORD, 0)
        self._entries = [
            builder.add(entries, builder.select(exists, builder.mul(stride, r), nothing))
            for exists, r in zip(self._exist, self._numbers, strict=True)
        ]

    def entry(self, n: Any) -> tuple[list[Any], list[Any]]:
        """Of entry n of each row: where the column's row of a panel starts, and the value splat."""
        builder = self.builder
        column = ir.IntType(8 * self.size)
        start = builder.mul(n, ir.Constant(WORD, 2 * self.size))
        width = ir.Constant(WORD, PANEL_REGISTERS * self.lanes)
        zero = ir.Constant(self.scalar, 0.0)
        offsets, values = [], []
        for row, exists in zip(self._entries, self._exist, strict=True):
            at = builder.add(row, start)
            j = builder.load(builder.inttoptr(at, column.as_pointer()))
            offsets.append(builder.mul(builder.sext(j, WORD) if self.size == 4 else j, width))
            at = builder.add(at, ir.Constant(WORD, self.size))
            x = builder.load(builder.inttoptr(at, self.scalar.as_pointer()))
            values.append(self.splat(builder.select(exists, x, zero)))
        return offsets, values

    def same(self, offsets: list[Any]) -> Any:
        """Whether all of them are one."""
        builder = self.builder
        differ = [builder.xor(offsets[0], other) for other in offsets[1:]]
        return builder.icmp_signed("==", reduce(builder.or_, differ), ir.Constant(WORD, 0))

    def elements(self, stride: Any, columns: Any) -> list[Any]:
        """(offset, mask, row, register) of each vector of these rows of a matrix."""
        builder, nothing = self.builder, ir.Constant(WORD, 0)
        found = []
        for r, exists in enumerate(self._exist):
            inside = builder.select(exists, columns, nothing)
            for j, place in enumerate(self.places):
                start = builder.add(builder.mul(stride, self._numbers[r]), place)
                found.append((start, self.first(builder.sub(inside, place)), r, j))
        return found
