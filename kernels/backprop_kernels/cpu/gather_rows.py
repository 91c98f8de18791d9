"""gather_rows: Y_r = X_(index_r).  docs/derivations.md#gather_rows

X (rows, …), index (n)    read
Y (n, …)                  written
Both threads gather, so that each finds its rows of the batch in its own cache afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import address
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit

CHUNK = 32  # rows per piece of work
FLOPS = 40  # of one word, roughly: rows come from anywhere in memory, and a miss costs that

(UNUSED, TICKET, X_, INDEX, Y_, ROWS, COUNT, WORDS) = range(8)


def gather_rows(X: Array, index: Array, out: Array | None = None) -> Array:
    """X (rows, …), index (n,) int64 → Y (n, …). Indices beyond X take its nearest row."""
    checks.gather_rows(X, index, out)
    checks.contiguous("gather_rows", X=X, index=index, out=out)
    Y = scratch((len(index), *X.shape[1:]), X.dtype) if out is None else out
    words = (X.nbytes // max(len(X), 1)) // 4  # a row; every dtype here is a multiple of 4 bytes
    arguments = Arguments((0, 0, X, index, Y, len(X), len(index), words))
    submit(Kernel(address(_kernel, 4), arguments, FLOPS * len(index) * words))
    return Y


def _kernel() -> Callable[..., None]:
    from backprop_kernels.cpu.memory import int64s, take
    from backprop_kernels.cpu.vector_loop import vector_loop

    copy = vector_loop(lambda x: (x,), "float32", 1)  # moves bits, whatever they mean

    def kernel(args, sync, thread, threads):
        index, rows, count, size = int64s(args[INDEX]), args[ROWS], args[COUNT], args[WORDS] * 4
        pieces = (count + CHUNK - 1) // CHUNK
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            for r in range(piece * CHUNK, min((piece + 1) * CHUNK, count)):
                source = min(max(index[r], 0), rows - 1)
                copy((args[X_] + source * size, args[Y_] + r * size), (), args[WORDS])

    return kernel
