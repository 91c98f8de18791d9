"""sparse_input: linear_forward and linear_wgrad, where most of X is 0.

docs/derivations.md#sparse_input

X (batch, in_features), W (out_features, in_features), b, dZ (batch, out_features)    read
Y (batch, out_features), dW (out_features, in_features)                               written
Fused and saved: as in linear_forward.py.
X is dense memory, whose elements that are not 0 are listed first, once for all kernels of a
program; or it is that list, made before by `entries`. Each entry costs a multiplication by a row of
a panel of Wᵀ or dWᵀ, which stays in L1. All rows have as many, so that no loop ends unforeseen: the
last of a short row multiply by 0 a row of the panel that is no column's. Zeros are skipped, also
where one would meet an infinite weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels import checks
from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu.compile import code
from backprop_kernels.cpu.epilogue import LEAF_ROWS, forward_epilogue
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, shared, submit
from backprop_kernels.cpu.tile import host_shape

PIECE = 72  # rows of a piece of work: a multiple of LEAF_ROWS and of the rows that go together
# A batch of more is summed in two halves, so that two threads each read the rows they wrote. Fixed
# by shape, whatever the threads.
SPLIT_ROWS = 512
PANEL_REGISTERS = 4  # 4 x 16 floats x 155 columns of X are 40 KB: most of an L1
LISTED = 20  # flops: what it costs to look at one element of X, roughly
EXPECTED = 5  # one in so many elements of X counts as work
ENTRY = {
    np.dtype(np.float32): np.dtype([("column", np.int32), ("value", np.float32)]),
    np.dtype(np.float64): np.dtype([("column", np.int64), ("value", np.float64)]),
}

# Slots of the kernels' arguments; the first two count work.
(TICKET, SECOND_TICKET, BATCH, IN, OUT, ENTRIES, STRIDE, COUNT, W_, PANELS, Y_, EPILOGUE,
 EPILOGUE_ARGS) = range(13)  # fmt: skip
X_, COUNTS = W_, PANELS  # of the list
DZ_, DW_, SPLITS = W_, Y_, EPILOGUE  # of the gradient


class Listed(NamedTuple):
    """Entries (batch, …) of every row, their bytes from row to row, and how many are looked at."""

    entries: Array | None
    stride: int
    count: Array  # (1,) int64


def sparse_input_forward(
    X: Array,
    W: Array,
    b: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """X (batch, in), W (out, in), b (out) → Y (batch, out) and what backward needs (Y, Z, None).

    X may be what `entries` made of it.
    """
    dense = _as_dense(X, W)
    checks.linear_forward(dense, W, b, activation, dropout, out, where="sparse_input_forward")
    Y, kept = out or (None, None)
    checks.contiguous("sparse_input_forward", X=X, W=W, b=b, out_Y=Y, out_saved=kept)
    if Y is None:
        Y = scratch((len(X), len(W)), W.dtype)
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else scratch)
    entry, args = forward_epilogue(Y, b, activation, dropout, kept) or (0, None)
    _submit(_forward, X, W, W, _panels(1, W), Y, entry, args)
    return Y, saved


def sparse_input_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in). With X of `entries`, `out` must be given."""
    dW = scratch((dZ.shape[1], X.shape[1]), dZ.dtype) if out is None else out
    checks.linear_wgrad(dZ, _as_dense(X, dW), dW, where="sparse_input_wgrad")
    checks.contiguous("sparse_input_wgrad", dZ=dZ, X=X, out=dW)
    splits = 2 if len(X) > SPLIT_ROWS else 1
    _submit(_wgrad, X, dW, dZ, _panels(splits, dW), dW, splits, None)
    return dW


def entries(X: Array) -> Array | None:
    """X (rows, in) → its elements that are not 0 as (rows, most) of ENTRY: columns and values.

    Rows with fewer end with entries of value 0 in column `in`. Nothing where that is larger than X.
    """
    kind = ENTRY[X.dtype]
    counts, count = np.empty(len(X), np.int64), np.zeros(1, np.int64)
    _list(X, Listed(None, 0, count), counts)
    most = int(count[0])
    if most * kind.itemsize > X.shape[1] * X.itemsize:
        return None
    found = np.empty((len(X), most), kind)
    _list(X, Listed(found, most * kind.itemsize, count), counts)
    return found


def _as_dense(X: Array, W: Array) -> Array:
    """Something of the shape that X has or, where it is a list, stands for."""
    if X.dtype != ENTRY.get(W.dtype):
        return X
    return np.broadcast_to(W.dtype.type(0), (len(X), W.shape[1]))


def _submit(make: Callable[[str], Callable[..., None]], X: Array, W: Array, *rest: Any) -> None:
    """A kernel over X's entries, after the one that lists them where that is to be done."""
    (out, columns), batch, kind = W.shape, len(X), ENTRY[W.dtype]

    def listed() -> Listed:
        stride = columns * kind.itemsize
        found = Listed(scratch((batch, columns), kind), stride, scratch(1, np.int64))
        _list(X, found, scratch(batch, np.int64))
        return found

    if X.dtype == kind:
        given = Listed(X, X.shape[1] * kind.itemsize, np.array([X.shape[1]]))
    else:
        given = shared(X, listed)
    arguments = Arguments((0, 0, batch, columns, out, *given, *rest))
    flops = 2 * batch * columns * out // EXPECTED
    submit(Kernel(code(make, 4, str(W.dtype)), arguments, flops))


def _list(X: Array, found: Listed, counts: Array) -> None:
    arguments = Arguments((0, 0, *X.shape, 0, *found, X, counts))
    submit(Kernel(code(_lister, 4, str(X.dtype)), arguments, LISTED * X.size))


def _panel_width(dtype: str) -> int:
    """Elements in a row of a panel."""
    return PANEL_REGISTERS * host_shape().lanes(dtype)


def _panels(copies: int, W: Array) -> Array:
    """Panels of (in_features + 1, width): the last row belongs to no column."""
    width = _panel_width(str(W.dtype))
    return scratch((copies, -(-len(W) // width), W.shape[1] + 1, width), W.dtype)


def _lister(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import barrier, int64s, pointer, take
    from backprop_kernels.cpu.sparse_rows import CHUNK, first_bit, make_nonzero_bits

    kind = getattr(types, dtype)
    size = kind.bitwidth // 8
    floats, columns_of = pointer(kind), pointer(types.int32 if size == 4 else types.int64)
    nonzero_bits, zero = make_nonzero_bits(dtype), kind(0)

    def kernel(args, sync, thread, threads):
        batch, columns, counts = args[BATCH], args[IN], int64s(args[COUNTS])
        pieces = (batch + PIECE - 1) // PIECE
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            for row in range(piece * PIECE, min((piece + 1) * PIECE, batch)):
                X = args[X_] + row * columns * size
                places = columns_of(args[ENTRIES] + row * args[STRIDE])
                values = floats(args[ENTRIES] + row * args[STRIDE])
                count = 0
                for j in range(0, columns, CHUNK):
                    bits = nonzero_bits(X + j * size, columns - j)
                    while bits != 0:
                        if args[ENTRIES] != 0:
                            column = j + first_bit(bits)
                            places[2 * count] = column
                            values[2 * count + 1] = floats(X)[column]
                        count += 1
                        bits &= bits - 1
                counts[row] = count
        barrier(sync, threads)
        most = 0
        for row in range(batch):
            most = max(most, counts[row])
        if thread == 0:
            int64s(args[COUNT])[0] = most
        taken = 0
        while args[ENTRIES] != 0:
            piece = take(args, SECOND_TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            for row in range(piece * PIECE, min((piece + 1) * PIECE, batch)):
                places = columns_of(args[ENTRIES] + row * args[STRIDE])
                values = floats(args[ENTRIES] + row * args[STRIDE])
                for n in range(counts[row], most):
                    places[2 * n] = columns
                    values[2 * n + 1] = zero

    return kernel


def _forward(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import barrier, call_epilogue, int64s, pointer, take
    from backprop_kernels.cpu.product import make_pack
    from backprop_kernels.cpu.sparse_rows import ROWS, make_multiply_rows

    kind = getattr(types, dtype)
    size, width = kind.bitwidth // 8, _panel_width(dtype)
    floats, zero = pointer(kind), kind(0)
    pack, multiply_rows = make_pack(dtype, width), make_multiply_rows(dtype)

    def kernel(args, sync, thread, threads):
        batch, in_features, out, stride = args[BATCH], args[IN], args[OUT], args[STRIDE]
        panels, panel_size = (out + width - 1) // width, (in_features + 1) * width * size
        taken = 0
        while True:
            panel = take(args, SECOND_TICKET, panels, thread, threads, taken)
            if panel < 0:
                break
            taken += 1
            W = args[W_] + panel * width * in_features * size
            columns = min(width, out - panel * width)
            packed = args[PANELS] + panel * panel_size
            pack(W, 1, in_features, in_features, columns, packed)
            for j in range(in_features * width, (in_features + 1) * width):
                floats(packed)[j] = zero
        barrier(sync, threads)
        pieces, count = (batch + PIECE - 1) // PIECE, int64s(args[COUNT])[0]
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            low, high = piece * PIECE, min((piece + 1) * PIECE, batch)
            for panel in range(panels):
                left = panel * width
                for row in range(low, high, ROWS):
                    multiply_rows(
                        args[ENTRIES] + row * stride, stride, count,
                        args[PANELS] + panel * panel_size, args[Y_] + (row * out + left) * size,
                        out, high - row, out - left,
                    )  # fmt: skip
            if args[EPILOGUE] != 0:
                for row in range(low, high, LEAF_ROWS):
                    rows = min(LEAF_ROWS, high - row)
                    call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], row, rows, 0, out)

    return kernel


def _wgrad(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import barrier, int64s, pointer, take
    from backprop_kernels.cpu.sparse_rows import ROWS, make_add_rows
    from backprop_kernels.cpu.tile import make_transpose
    from backprop_kernels.cpu.vector_loop import vector_loop

    kind, shape = getattr(types, dtype), host_shape()
    size, width, lanes = kind.bitwidth // 8, _panel_width(dtype), shape.lanes(dtype)
    floats, zero = pointer(kind), kind(0)
    add_rows, add = make_add_rows(dtype), vector_loop(lambda x, y: (x + y,), dtype, 2)
    transpose = make_transpose(dtype, lanes, shape.vector_bytes)

    def kernel(args, sync, thread, threads):
        batch, in_features, out, stride = args[BATCH], args[IN], args[OUT], args[STRIDE]
        panels, panel_size = (out + width - 1) // width, (in_features + 1) * width * size
        splits, count = args[SPLITS], int64s(args[COUNT])[0]
        taken = 0
        while True:
            piece = take(args, TICKET, splits * panels, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            split, left = piece // panels, piece % panels * width
            sums = args[PANELS] + piece * panel_size
            for i in range((in_features + 1) * width):
                floats(sums)[i] = zero
            low, high = split * batch // splits, (split + 1) * batch // splits
            for row in range(low, high, ROWS):
                add_rows(
                    args[ENTRIES] + row * stride, stride, count,
                    args[DZ_] + (row * out + left) * size, out, high - row, sums, out - left,
                )  # fmt: skip
        barrier(sync, threads)
        taken = 0
        while True:
            panel = take(args, SECOND_TICKET, panels, thread, threads, taken)
            if panel < 0:
                break
            taken += 1
            sums = args[PANELS] + panel * panel_size
            if splits > 1:
                add((sums, sums + panels * panel_size, sums), (), in_features * width)
            columns = min(width, out - panel * width)
            dW = args[DW_] + panel * width * in_features * size
            squares = in_features // lanes * lanes if columns == width else 0
            for j in range(0, squares, lanes):
                for i in range(0, width, lanes):
                    source = sums + (j * width + i) * size
                    transpose(source, width, dW + (i * in_features + j) * size, in_features)
            for i in range(columns):
                for j in range(squares, in_features):
                    floats(dW)[i * in_features + j] = floats(sums)[j * width + i]

    return kernel
