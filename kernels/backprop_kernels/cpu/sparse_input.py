"""sparse_input: linear_forward and linear_wgrad, where most of X is 0.

docs/derivations.md#sparse_input

X (batch, in_features), W (out_features, in_features), b, dZ (batch, out_features)    read
Y (batch, out_features), dW (out_features, in_features)                               written
Fused and saved: as in linear_forward.py.
X is dense memory. Two rows at a time, the columns where either is not 0 are listed first, once for
all kernels of a program; then each costs two multiplications by a row of a panel of Wᵀ or dWᵀ,
which stays in L1. The others are skipped, also where a 0 would meet an infinite weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels import checks
from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu.compile import address
from backprop_kernels.cpu.epilogue import LEAF_ROWS, forward_epilogue
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, shared, submit
from backprop_kernels.cpu.tile import host_shape

PAIRS = 36  # of rows per piece of work: twice that is a multiple of LEAF_ROWS
# A batch of more is summed in two halves, so that two threads each read the rows they wrote. Fixed
# by shape, whatever the threads.
SPLIT_PAIRS = 256
PANEL_REGISTERS = 4  # 4 x 16 floats x 155 columns of X are 40 KB: most of an L1
LISTED = 20  # flops: what it costs to look at one element of X, roughly
EXPECTED = 5  # one in so many elements of X counts as work

# Slots of the kernels' arguments; the first two count work.
(TICKET, SECOND_TICKET, BATCH, IN, OUT, X_, POSITIONS, VALUES, COUNTS, W_, PANELS, Y_, EPILOGUE,
 EPILOGUE_ARGS) = range(14)  # fmt: skip
DZ_, DW_, SPLITS = W_, Y_, EPILOGUE  # of the gradient


class Nonzeros(NamedTuple):
    """For each pair of rows the columns where either is not 0, from the left."""

    positions: Array  # (pairs, in_features) int32
    values: Array  # (pairs, in_features, 2): both rows' elements there
    counts: Array  # (pairs,) int64: how many places of a pair are in use


def sparse_input_forward(
    X: Array,
    W: Array,
    b: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """X (batch, in), W (out, in), b (out) → Y (batch, out) and what backward needs (Y, Z, None)."""
    checks.linear_forward(X, W, b, activation, dropout, out, where="sparse_input_forward")
    Y, kept = out or (None, None)
    checks.contiguous("sparse_input_forward", X=X, W=W, b=b, out_Y=Y, out_saved=kept)
    if Y is None:
        Y = scratch((len(X), len(W)), X.dtype)
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else scratch)
    entry, args = forward_epilogue(Y, b, activation, dropout, kept) or (0, None)
    _submit(_forward, X, len(W), W, _panels(1, X, len(W)), Y, entry, args)
    return Y, saved


def sparse_input_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    checks.linear_wgrad(dZ, X, out, where="sparse_input_wgrad")
    checks.contiguous("sparse_input_wgrad", dZ=dZ, X=X, out=out)
    out_features = dZ.shape[1]
    dW = scratch((out_features, X.shape[1]), dZ.dtype) if out is None else out
    splits = 2 if _pairs(X) > SPLIT_PAIRS else 1
    _submit(_wgrad, X, out_features, dZ, _panels(splits, X, out_features), dW, splits, None)
    return dW


def _submit(make: Callable[[str], Callable[..., None]], X: Array, out: int, *rest: Any) -> None:
    """A kernel over X's nonzeros, after the one that lists them."""
    (batch, columns), dtype = X.shape, str(X.dtype)

    def listed() -> Nonzeros:
        shape = _pairs(X), columns
        found = Nonzeros(
            scratch(shape, np.int32), scratch((*shape, 2), X.dtype), scratch(shape[0], np.int64)
        )
        arguments = Arguments((0, 0, batch, columns, 0, X, *found))
        submit(Kernel(address(_list_nonzeros, 4, dtype), arguments, LISTED * X.size))
        return found

    arguments = Arguments((0, 0, batch, columns, out, 0, *shared(X, listed), *rest))
    submit(Kernel(address(make, 4, dtype), arguments, 2 * X.size * out // EXPECTED))


def _pairs(X: Array) -> int:
    return -(-len(X) // 2)


def _panel_width(dtype: str) -> int:
    """Elements in a row of a panel."""
    return PANEL_REGISTERS * host_shape().lanes(dtype)


def _panels(copies: int, X: Array, out: int) -> Array:
    width = _panel_width(str(X.dtype))
    return scratch((copies, -(-out // width), X.shape[1], width), X.dtype)


def _list_nonzeros(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import int64s, pointer, take
    from backprop_kernels.cpu.sparse_pair import CHUNK, first_bit, make_nonzero_bits

    kind = getattr(types, dtype)
    floats, int32s, size = pointer(kind), pointer(types.int32), kind.bitwidth // 8
    nonzero_bits, zero = make_nonzero_bits(dtype), kind(0)

    def kernel(args, sync, thread, threads):
        batch, columns, counts = args[BATCH], args[IN], int64s(args[COUNTS])
        pairs = (batch + 1) // 2
        pieces = (pairs + PAIRS - 1) // PAIRS
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            for pair in range(piece * PAIRS, min((piece + 1) * PAIRS, pairs)):
                X = args[X_] + 2 * pair * columns * size
                below = X + columns * size
                positions = int32s(args[POSITIONS] + pair * columns * 4)
                values = floats(args[VALUES] + 2 * pair * columns * size)
                both = 2 * pair + 1 < batch
                count = 0
                for j in range(0, columns, CHUNK):
                    bits = nonzero_bits(X + j * size, columns - j)
                    if both:
                        bits |= nonzero_bits(below + j * size, columns - j)
                    while bits != 0:
                        position = j + first_bit(bits)
                        positions[count] = position
                        values[2 * count] = floats(X)[position]
                        values[2 * count + 1] = floats(below)[position] if both else zero
                        count += 1
                        bits &= bits - 1
                counts[pair] = count

    return kernel


def _forward(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import barrier, call_epilogue, int64s, take
    from backprop_kernels.cpu.product import make_pack
    from backprop_kernels.cpu.sparse_pair import make_multiply_pair

    size, width = getattr(types, dtype).bitwidth // 8, _panel_width(dtype)
    pack, multiply_pair = make_pack(dtype, width), make_multiply_pair(dtype)

    def kernel(args, sync, thread, threads):
        batch, in_features, out, counts = args[BATCH], args[IN], args[OUT], int64s(args[COUNTS])
        panels, panel_size = (out + width - 1) // width, in_features * width * size
        pairs = (batch + 1) // 2
        taken = 0
        while True:
            panel = take(args, SECOND_TICKET, panels, thread, threads, taken)
            if panel < 0:
                break
            taken += 1
            W = args[W_] + panel * panel_size
            columns = min(width, out - panel * width)
            pack(W, 1, in_features, in_features, columns, args[PANELS] + panel * panel_size)
        barrier(sync, threads)
        pieces = (pairs + PAIRS - 1) // PAIRS
        taken = 0
        while True:
            piece = take(args, TICKET, pieces, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            low, high = piece * PAIRS, min((piece + 1) * PAIRS, pairs)
            for panel in range(panels):
                left = panel * width
                for pair in range(low, high):
                    multiply_pair(
                        args[POSITIONS] + pair * in_features * 4,
                        args[VALUES] + 2 * pair * in_features * size, counts[pair],
                        args[PANELS] + panel * panel_size,
                        args[Y_] + (2 * pair * out + left) * size, out, batch - 2 * pair,
                        out - left,
                    )  # fmt: skip
            if args[EPILOGUE] != 0:
                bottom = min(2 * high, batch)
                for row in range(2 * low, bottom, LEAF_ROWS):
                    rows = min(LEAF_ROWS, bottom - row)
                    call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], row, rows, 0, out)

    return kernel


def _wgrad(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import barrier, int64s, pointer, take
    from backprop_kernels.cpu.sparse_pair import make_add_pair
    from backprop_kernels.cpu.tile import make_transpose
    from backprop_kernels.cpu.vector_loop import vector_loop

    kind, shape = getattr(types, dtype), host_shape()
    size, width, lanes = kind.bitwidth // 8, _panel_width(dtype), shape.lanes(dtype)
    floats, zero = pointer(kind), kind(0)
    add_pair, add = make_add_pair(dtype), vector_loop(lambda x, y: (x + y,), dtype, 2)
    transpose = make_transpose(dtype, lanes, shape.vector_bytes)

    def kernel(args, sync, thread, threads):
        batch, in_features, out, counts = args[BATCH], args[IN], args[OUT], int64s(args[COUNTS])
        panels, panel_size = (out + width - 1) // width, in_features * width * size
        splits, pairs = args[SPLITS], (batch + 1) // 2
        taken = 0
        while True:
            piece = take(args, TICKET, splits * panels, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            split, left = piece // panels, piece % panels * width
            sums = args[PANELS] + piece * panel_size
            for i in range(in_features * width):
                floats(sums)[i] = zero
            for pair in range(split * pairs // splits, (split + 1) * pairs // splits):
                add_pair(
                    args[POSITIONS] + pair * in_features * 4,
                    args[VALUES] + 2 * pair * in_features * size, counts[pair],
                    args[DZ_] + (2 * pair * out + left) * size, out, batch - 2 * pair, sums,
                    out - left,
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
