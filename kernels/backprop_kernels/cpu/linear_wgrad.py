"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad

dZ (batch, out_features), X (batch, in_features)    read
dW (out_features, in_features)                      written
The product has M = out_features, N = in_features, K = batch. Of one output it is a sum of weighted
rows of X, where a tile of `product.py` would be eleven twelfths padding.
"""

from __future__ import annotations

from collections.abc import Callable

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import code
from backprop_kernels.cpu.product import multiply
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit

ROWS = 64  # of X per piece of work, summed for themselves; then the pieces in order
COLUMNS = 512  # per piece of that second sum

# Slots of the kernel's arguments; the first two count work.
(TICKET, SECOND_TICKET, BATCH, IN, DZ_, X_, SUMS, DW_) = range(8)


def linear_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    checks.linear_wgrad(dZ, X, out)
    checks.contiguous("linear_wgrad", dZ=dZ, X=X, out=out)
    dW = scratch((dZ.shape[1], X.shape[1]), dZ.dtype) if out is None else out
    if dZ.shape[1] == 1:
        sums = scratch((-(-len(X) // ROWS), X.shape[1]), X.dtype)
        arguments = Arguments((0, 0, *X.shape, dZ, X, sums, dW))
        submit(Kernel(code(_weighted_sum, 4, str(X.dtype)), arguments, 2 * X.size))
    else:
        multiply(dZ.T, X, dW)
    return dW


def _weighted_sum(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import barrier, pointer, take
    from backprop_kernels.cpu.vector_loop import vector_loop

    kind = getattr(types, dtype)
    floats, zero, size = pointer(kind), kind(0), kind.bitwidth // 8
    add = vector_loop(lambda s, x: (s + x,), dtype, 2)
    add_one = vector_loop(lambda s, x, u: (s + u * x,), dtype, 2, 1)
    add_four = vector_loop(
        lambda s, a, b, c, d, t, u, v, w: (s + ((t * a + u * b) + (v * c + w * d)),), dtype, 5, 4
    )

    def kernel(args, sync, thread, threads):
        batch, columns, dZ = args[BATCH], args[IN], floats(args[DZ_])
        width, pieces = columns * size, (batch + ROWS - 1) // ROWS
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            sums = args[SUMS] + piece * width
            for j in range(columns):
                floats(sums)[j] = zero
            row, bottom = piece * ROWS, min((piece + 1) * ROWS, batch)
            while row < bottom:
                X = args[X_] + row * width
                if row + 4 <= bottom:
                    add_four(
                        (sums, X, X + width, X + 2 * width, X + 3 * width, sums),
                        (dZ[row], dZ[row + 1], dZ[row + 2], dZ[row + 3]), columns,
                    )  # fmt: skip
                    row += 4
                else:
                    add_one((sums, X, sums), (dZ[row],), columns)
                    row += 1
        barrier(sync, threads)
        taken = 0
        while True:
            part = take(
                args, SECOND_TICKET, (columns + COLUMNS - 1) // COLUMNS, thread, threads, taken
            )
            if part < 0:
                break
            taken += 1
            first = part * COLUMNS
            count = min(COLUMNS, columns - first)
            dW = args[DW_] + first * size
            for j in range(count):
                floats(dW)[j] = zero
            for piece in range(pieces):
                add((dW, args[SUMS] + piece * width + first * size, dW), (), count)

    return kernel
