"""The product behind linear_forward where there are few outputs: Y = X Wᵀ, a dot product each.

With out_features below the lanes of a register, much of a tile of `product.py` would be padding.
Here the registers run along in_features, where rows of both X and W lie contiguous, and nothing is
packed: a third of the time for one output, two thirds for ten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import Code, code
from backprop_kernels.cpu.epilogue import LEAF_ROWS
from backprop_kernels.cpu.program import Arguments, Kernel, submit
from backprop_kernels.cpu.tile import host_shape

ROWS = 2 * LEAF_ROWS  # of X per piece of work
L1 = 2**15  # bytes
TOGETHER = 8  # rows of X that share a register of W: enough sums to hide an addition's latency

# Slots of the kernel's arguments; the first two count work.
(TICKET, _, BATCH, OUT, IN, X_, W_, Y_, EPILOGUE, EPILOGUE_ARGS) = range(10)


def is_narrow(W: Array) -> bool:
    """Whether these weights have few outputs, for which TOGETHER rows of X wait in L1."""
    few = 3 * len(W) <= 2 * host_shape().lanes(str(W.dtype))
    return few and (len(W) == 1 or TOGETHER * W.shape[1] * W.itemsize <= L1)


def multiply_narrow(X: Array, W: Array, Y: Array, epilogue: tuple[Code, Arguments] | None) -> None:
    """Submit Y = X Wᵀ, then `epilogue` as in product.py. All are C-contiguous."""
    arguments = Arguments((0, 0, *Y.shape, X.shape[1], X, W, Y, *(epilogue or (None, None))))
    submit(Kernel(code(_kernel, 4, str(Y.dtype)), arguments, 2 * Y.size * X.shape[1]))


def _kernel(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import call_epilogue, take

    size = getattr(types, dtype).bitwidth // 8
    several, one = make_dots(dtype, TOGETHER), make_dots(dtype, 1)

    def kernel(args, sync, thread, threads):
        batch, out, columns = args[BATCH], args[OUT], args[IN]
        pieces = (batch + ROWS - 1) // ROWS
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            row, bottom = piece * ROWS, min((piece + 1) * ROWS, batch)
            while row < bottom:
                rows = TOGETHER if row + TOGETHER <= bottom else 1
                X, Y = args[X_] + row * columns * size, args[Y_] + row * out * size
                for k in range(out):
                    W = args[W_] + k * columns * size
                    if rows > 1:
                        several(X, columns, W, columns, Y + k * size, out)
                    else:
                        one(X, columns, W, columns, Y + k * size, out)
                row += rows
            if args[EPILOGUE] != 0:
                for row in range(piece * ROWS, bottom, LEAF_ROWS):
                    rows = min(LEAF_ROWS, bottom - row)
                    call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], row, rows, 0, out)

    return kernel


def make_dots(dtype: str, rows: int) -> Any:
    """A Numba intrinsic f(A, a_row, b, count, c, c_step): the dot products of rows of A with b.

    c[i · c_step] = Σ over k < count of A[i · a_row + k] b[k], for i < rows. Each lane sums its own
    terms in order; then halves of the register are added until one number is left.
    """
    from llvmlite import ir
    from numba import types
    from numba.core.cgutils import alloca_once
    from numba.extending import intrinsic

    from backprop_kernels.cpu.vector_loop import Vectors, each

    @intrinsic
    def dots(context: Any, A: Any, a_row: Any, b: Any, count: Any, c: Any, c_step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            A, a_row, b, count, c, c_step = arguments
            vectors = Vectors(builder, dtype)
            word = ir.IntType(64)
            starts = [builder.mul(a_row, ir.Constant(word, i)) for i in range(rows)]
            sums = [alloca_once(builder, vectors.type) for _ in range(rows)]
            for total in sums:
                builder.store(ir.Constant(vectors.type, [0.0] * vectors.lanes), total)

            def body(offset: Any, mask: Any) -> None:
                right = vectors.load(b, offset, mask).ir
                for start, total in zip(starts, sums, strict=True):
                    left = vectors.load(A, builder.add(start, offset), mask).ir
                    builder.store(vectors.fma(left, right, builder.load(total)), total)

            each(builder, count, vectors, body)
            target = builder.inttoptr(c, vectors.scalar.as_pointer())
            for i, total in enumerate(sums):
                place = builder.gep(target, [builder.mul(c_step, ir.Constant(word, i))])
                builder.store(vectors.sum(builder.load(total)), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return dots
