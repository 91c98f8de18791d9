"""gather_rows: Y_r = X_(index_r).  docs/derivations.md#gather_rows

X (rows, …), index (n)    read
Y (n, …)                  written
Both threads gather, so that each finds its rows of the batch in its own cache afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import code
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit

CHUNK = 32  # rows per piece of work
# No CPU can foresee which row comes next: its first bytes are fetched while others are copied, so
# that about so many bytes are on their way.
AHEAD, FETCHED = 2048, 2048
FLOPS = 40  # of one word, roughly: rows come from anywhere in memory, and a miss costs that

(UNUSED, TICKET, X_, INDEX, Y_, ROWS, COUNT, WORDS) = range(8)


def gather_rows(X: Array, index: Array, out: Array | None = None) -> Array:
    """X (rows, …), index (n,) int64 → Y (n, …). Indices beyond X take its nearest row."""
    checks.gather_rows(X, index, out)
    checks.contiguous("gather_rows", X=X, index=index, out=out)
    Y = scratch((len(index), *X.shape[1:]), X.dtype) if out is None else out
    words = (X.nbytes // max(len(X), 1)) // 4  # a row; every dtype here is a multiple of 4 bytes
    arguments = Arguments((0, 0, X, index, Y, len(X), len(index), words))
    submit(Kernel(code(_kernel, 4), arguments, FLOPS * len(index) * words))
    return Y


def _kernel() -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import int64s, pointer, prefetch, take
    from backprop_kernels.cpu.vector_loop import vector_loop

    int32s = pointer(types.int32)
    copy = vector_loop(lambda x: (x,), "float32", 1)  # moves bits, whatever they mean

    def kernel(args, sync, thread, threads):
        index, rows, count, words = int64s(args[INDEX]), args[ROWS], args[COUNT], args[WORDS]
        X, Y, size = args[X_], args[Y_], words * 4
        sources, targets = int32s(X), int32s(Y)
        pieces = (count + CHUNK - 1) // CHUNK
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            low, high = piece * CHUNK, min((piece + 1) * CHUNK, count)
            if words == 1:  # a target, a class
                for r in range(low, high):
                    targets[r] = sources[min(max(index[r], 0), rows - 1)]
                continue
            ahead = max(2, min(AHEAD // max(size, 1), 16))
            for r in range(low - ahead, high):
                if r + ahead < high:
                    following = X + min(max(index[r + ahead], 0), rows - 1) * size
                    for line in range(0, min(size, FETCHED), 64):
                        prefetch(following + line)
                if r >= low:
                    copy((X + min(max(index[r], 0), rows - 1) * size, Y + r * size), (), words)

    return kernel
