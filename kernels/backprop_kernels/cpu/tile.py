"""The register tile: rows x columns of C += A B, kept in vector registers over the whole of K.

Each step of K loads the columns of one row of B, and multiplies them by one element of each row of
A, broadcast. The shape fills the registers and needs few instructions besides the multiplications:
on AVX-512, 9 x 3 beat 12 x 2, 8 x 3, 6 x 4 and 5 x 5 from data in L2, by a tenth where another
hyperthread shared the core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from backprop_kernels.cpu.compile import cpu_features


@dataclass(frozen=True)
class Shape:
    """How a CPU's tile is laid out: vector register bytes, rows, and registers per row.

    unroll: steps of K per turn of its loop, so that the loop's own instructions weigh little.
    """

    vector_bytes: int
    rows: int
    registers: int
    unroll: int

    def lanes(self, dtype: str) -> int:
        """Elements in a register."""
        return self.vector_bytes // (4 if dtype == "float32" else 8)

    def columns(self, dtype: str) -> int:
        """Elements in a row of the tile."""
        return self.registers * self.lanes(dtype)


SHAPES = {
    "+avx512f": Shape(64, 9, 3, 4),  # 27 of 32 registers accumulate
    "+avx2": Shape(32, 6, 2, 4),  # 12 of 16
    "+neon": Shape(16, 6, 4, 1),  # 24 of 32; unrolled, LLVM runs out of registers
    "": Shape(16, 6, 2, 1),  # SSE2 and everything else
}


@cache
def host_shape() -> Shape:
    """The shape for this CPU: the first feature of the table that it has."""
    features = cpu_features().split(",")
    return next(shape for feature, shape in SHAPES.items() if not feature or feature in features)


def make_tile(dtype: str, rows: int, registers: int, shape: Shape, along: bool) -> Any:
    """A Numba intrinsic: tile(A, a_stride, B, b_k, C, c_row, K, accumulate, columns).

    A, B and C are addresses; a_stride, b_k, c_row strides in elements. `along`: A's rows are
    contiguous along K and a_stride is from row to row; else its columns are, and a_stride is from
    one step of K to the next. C gains the product where `accumulate` is not 0, else is
    overwritten; only its first `columns` columns are touched. B is read `registers` whole vectors
    wide: ragged panels are padded.
    """
    from llvmlite import ir
    from numba import types
    from numba.core.cgutils import get_or_insert_function
    from numba.extending import intrinsic

    scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()
    size = 4 if dtype == "float32" else 8
    lanes = shape.lanes(dtype)
    vector = ir.VectorType(scalar, lanes)
    mask = ir.VectorType(ir.IntType(1), lanes)
    word = ir.IntType(64)
    suffix = f"v{lanes}f{8 * size}"
    zero = ir.Constant(vector, [0.0] * lanes)

    def number(n: int) -> Any:
        return ir.Constant(word, n)

    def splat(builder: Any, value: Any) -> Any:
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return builder.shuffle_vector(first, undefined, zeros)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        A, a_stride, B, b_k, C, c_row, K, accumulate, columns = arguments
        a_row, a_k = (a_stride, number(1)) if along else (number(1), a_stride)
        pointer = scalar.as_pointer()
        A, B, C = (builder.inttoptr(x, pointer) for x in (A, B, C))
        module = builder.module
        fma = get_or_insert_function(
            module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.{suffix}"
        )
        where = ir.IntType(32)
        load = get_or_insert_function(
            module,
            ir.FunctionType(vector, [vector.as_pointer(), where, mask, vector]),
            f"llvm.masked.load.{suffix}.p0",
        )
        store = get_or_insert_function(
            module,
            ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), where, mask]),
            f"llvm.masked.store.{suffix}.p0",
        )
        prefetch = get_or_insert_function(
            module,
            ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), where, where, where]),
            "llvm.prefetch.p0",
        )

        def at(base: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        # C's lines are on their way while K runs: its rows lie far apart, often a page each.
        C_rows = [builder.gep(C, [builder.mul(c_row, number(i))]) for i in range(rows)]
        for row in C_rows:
            for j in range(0, registers * shape.vector_bytes, 64):
                line = builder.bitcast(
                    builder.gep(row, [number(j // size)]), ir.IntType(8).as_pointer()
                )
                builder.call(prefetch, [line, *(ir.Constant(where, n) for n in (1, 3, 1))])

        # Where the rows of A are contiguous, one pointer for every three, which x86 addresses as p,
        # p + row, p + 2 row. Left alone, LLVM walks a single pointer from row to row, a chain of
        # additions longer than the multiplications it feeds. Annotated numbers it takes for
        # unrelated.
        byte = ir.IntType(8).as_pointer()
        annotate = get_or_insert_function(
            module, ir.FunctionType(word, [word, byte, byte, where]), "llvm.annotation.i64.p0"
        )
        nothing = [ir.Constant(byte, None), ir.Constant(byte, None), ir.Constant(where, 0)]
        group = 3 if along else rows
        starts = [B]
        for i in range(0, rows, group):
            start = builder.gep(A, [builder.mul(a_row, number(i))])
            hidden = builder.call(annotate, [builder.ptrtoint(start, word), *nothing])
            starts.append(builder.inttoptr(hidden, pointer))
        pointers = len(starts)
        starts += [zero] * (rows * registers)

        def steps_of_K(k: Any, end: Any, starts: list[Any], unroll: int) -> tuple[Any, list[Any]]:
            """A loop from k to end, `unroll` steps at a time; what it leaves."""
            before = builder.block
            loop = builder.append_basic_block("k")
            after = builder.append_basic_block("after")
            builder.cbranch(builder.icmp_signed("<", k, end), loop, after)
            builder.position_at_end(loop)
            now_k, now = builder.phi(word), [builder.phi(x.type) for x in starts]
            sums = now[pointers:]
            for step in range(unroll):
                B_k = builder.gep(now[0], [builder.mul(b_k, number(step))])
                B_row = []
                for j in range(registers):
                    B_row.append(builder.load(at(B_k, number(j * lanes))))
                    B_row[j].align = size
                for i in range(rows):
                    offset = builder.add(
                        builder.mul(a_row, number(i % group)), builder.mul(a_k, number(step))
                    )
                    element = builder.load(builder.gep(now[1 + i // group], [offset]))
                    a = splat(builder, element)
                    for j in range(registers):
                        place = i * registers + j
                        sums[place] = builder.call(fma, [a, B_row[j], sums[place]])
            strides = [b_k] + [a_k] * (pointers - 1)
            then = [
                builder.gep(p, [builder.mul(stride, number(unroll))])
                for p, stride in zip(now, strides, strict=False)
            ]
            then += sums
            following = builder.add(now_k, number(unroll))
            builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
            now_k.add_incoming(k, before)
            now_k.add_incoming(following, loop)
            for phi, first, last in zip(now, starts, then, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(last, loop)
            builder.position_at_end(after)
            left = []
            for first, last in zip([k, *starts], [following, *then], strict=True):
                left.append(builder.phi(first.type))
                left[-1].add_incoming(first, before)
                left[-1].add_incoming(last, loop)
            return left[0], left[1:]

        k, state = number(0), starts
        if shape.unroll > 1:
            whole_K = builder.and_(K, number(-shape.unroll))
            k, state = steps_of_K(k, whole_K, state, shape.unroll)
        _, state = steps_of_K(k, K, state, 1)
        totals = state[pointers:]
        adds = builder.icmp_signed("!=", accumulate, number(0))
        whole = builder.icmp_signed(">=", columns, number(registers * lanes))
        alignment = ir.Constant(where, size)
        with builder.if_else(whole) as (full, ragged):
            with full, builder.if_else(adds) as (add, assign):
                for branch, adding in ((add, True), (assign, False)):
                    with branch:
                        places = [
                            at(row, number(j * lanes)) for row in C_rows for j in range(registers)
                        ]
                        values = totals
                        if adding:
                            values = []
                            for total, place in zip(totals, places, strict=True):
                                old = builder.load(place)
                                old.align = size
                                values.append(builder.fadd(old, total))
                        for value, place in zip(values, places, strict=True):
                            builder.store(value, place).align = size
            with ragged:
                steps = ir.VectorType(word, lanes)
                for j in range(registers):
                    lane = ir.Constant(steps, list(range(j * lanes, (j + 1) * lanes)))
                    undefined = ir.Constant(steps, ir.Undefined)
                    bound = builder.insert_element(undefined, columns, ir.Constant(where, 0))
                    zeros = ir.Constant(ir.VectorType(where, lanes), [0] * lanes)
                    bound = builder.shuffle_vector(bound, undefined, zeros)
                    inside = builder.icmp_signed("<", lane, bound)
                    reads = builder.and_(inside, _repeat(builder, adds, mask, lanes, zeros))
                    for i, row in enumerate(C_rows):
                        place = at(row, number(j * lanes))
                        old = builder.call(load, [place, alignment, reads, zero])
                        value = builder.fadd(old, totals[i * registers + j])
                        # −0.0 + 0 is +0: keep an unadded product's own zero.
                        value = builder.select(adds, value, totals[i * registers + j])
                        builder.call(store, [value, place, alignment, inside])
        return context.get_dummy_value()

    @intrinsic
    def tile(
        context: Any, A: Any, a_stride: Any, B: Any, b_k: Any, C: Any, c_row: Any, K: Any,
        accumulate: Any, columns: Any,
    ) -> Any:  # fmt: skip
        return types.void(*[types.int64] * 9), generate

    return tile


def make_transpose(dtype: str, rows: int, vector_bytes: int) -> Any:
    """A Numba intrinsic: transpose(source, row, target, step): a block of `rows` x lanes.

    source[i * row + k] becomes target[k * step + i]; both are addresses, strides in elements.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()
    size = 4 if dtype == "float32" else 8
    lanes = vector_bytes // size
    vector = ir.VectorType(scalar, lanes)
    indices = ir.VectorType(ir.IntType(32), lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, row, target, step = arguments
        source, target = (builder.inttoptr(x, scalar.as_pointer()) for x in (source, target))

        def place(base: Any, stride: Any, i: int) -> Any:
            offset = builder.mul(stride, ir.Constant(ir.IntType(64), i))
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        values = []
        for i in range(rows):
            value = builder.load(place(source, row, i))
            value.align = size
            values.append(value)
        values += [ir.Constant(vector, ir.Undefined)] * (lanes - rows)
        # log2(lanes) rounds: rows i and i + half swap their off-diagonal blocks of `half` columns.
        half = lanes // 2
        while half:
            low = [j if j & half == 0 else j - half + lanes for j in range(lanes)]
            high = [j + half if j & half == 0 else j + lanes for j in range(lanes)]
            for i in range(lanes):
                if i & half == 0:
                    a, b = values[i], values[i + half]
                    values[i] = builder.shuffle_vector(a, b, ir.Constant(indices, low))
                    values[i + half] = builder.shuffle_vector(a, b, ir.Constant(indices, high))
            half //= 2
        for i, value in enumerate(values):
            if rows < lanes:
                first = ir.Constant(ir.VectorType(ir.IntType(32), rows), list(range(rows)))
                value = builder.shuffle_vector(value, value, first)
            where = builder.bitcast(place(target, step, i), value.type.as_pointer())
            builder.store(value, where).align = size
        return context.get_dummy_value()

    @intrinsic
    def transpose(context: Any, source: Any, row: Any, target: Any, step: Any) -> Any:
        return types.void(*[types.int64] * 4), generate

    return transpose


def _repeat(builder: Any, bit: Any, mask: Any, lanes: int, zeros: Any) -> Any:
    from llvmlite import ir

    undefined = ir.Constant(mask, ir.Undefined)
    first = builder.insert_element(undefined, bit, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, zeros)
