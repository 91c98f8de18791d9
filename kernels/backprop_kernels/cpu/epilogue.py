"""What runs on a block of a product or norm while it is in cache, and how column sums end.

Forward: bias, activation, dropout. Backward: dropout's mask, the activation's derivative, the
partial column sums that become db. One machine-code function per activation and use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu.compile import Code, code
from backprop_kernels.cpu.program import Arguments, scratch

LEAF_ROWS = 36  # rows per partial column sum: a multiple of every tile's

# Slots, shared by both directions. Forward: C is Z, then Y. Backward: C is dY, then dZ.
(C_, COLUMNS, BIAS, SAVED, STREAM, LAYER, THRESHOLD, SCALE, PARTIAL, SUMS, BLOCKS) = range(11)


def forward_epilogue(
    Y: Array, b: Array | None, activation: str, dropout: Dropout | None, kept: Array | None
) -> tuple[Code, Arguments] | None:
    """(code, args) that turns the products in Y into dropout(act(Y + b)); None for nothing."""
    dropped = dropout is not None and dropout.rate > 0
    keeps = ACTIVATIONS[activation].saves if kept is not None else ""
    if activation == "identity" and b is None and not dropped:
        return None
    entry = code(_forward, 5, str(Y.dtype), activation, keeps, b is not None, dropped)
    return entry, Arguments((Y, Y.shape[1], b, kept, *_dropout(dropout, Y.dtype), None, None, 0))


def backward_epilogue(
    dX: Array, saved: Array | None, activation: str, dropout: Dropout | None, db: Array | None
) -> tuple[tuple[Code, Arguments] | None, Code | None]:
    """((code, args), finish): from the gradient of the layer below's output to its dZ and db."""
    dropped = dropout is not None and dropout.rate > 0
    rows, columns = dX.shape
    if activation == "identity" and db is None and not dropped:
        return None, None
    blocks = -(-rows // LEAF_ROWS)
    partial = None if db is None else scratch((blocks, columns), dX.dtype)
    entry = code(_backward, 5, str(dX.dtype), activation, db is not None, dropped)
    arguments = Arguments(
        (dX, columns, None, saved, *_dropout(dropout, dX.dtype), partial, db, blocks)
    )
    return (entry, arguments), None if db is None else column_sums(dX.dtype)


def column_sums(dtype: Any) -> Code:
    """The kernel that adds the partial sums of all blocks, in order: SUMS from PARTIAL."""
    return code(_column_sums, 4, str(dtype))


def _dropout(dropout: Dropout | None, dtype: Any) -> tuple[Any, ...]:
    """STREAM, LAYER, THRESHOLD, SCALE."""
    if dropout is None or dropout.rate == 0:
        return None, 0, 0, None
    scale = scratch(1, dtype)
    scale[0] = 1 / (1 - dropout.rate)
    return dropout.stream, dropout.layer, round(dropout.rate * 2**32), scale


def _forward(
    dtype: str, activation: str, keeps: str, has_bias: bool, dropped: bool
) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu import vector_math
    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.philox import drop_row
    from backprop_kernels.cpu.vector_loop import vector_loop

    act = ACTIVATIONS[activation]
    size = 4 if dtype == "float32" else 8

    def formula(z: Any, *bias: Any) -> tuple[Any, ...]:
        z = z + bias[0] if has_bias else z
        y = act.forward(vector_math, z)
        return (y, z) if keeps == "Z" else (y, y) if keeps == "Y" else (y,)

    apply = vector_loop(formula, dtype, 2 if has_bias else 1)
    floats = pointer(getattr(types, dtype))
    drop = drop_row(dtype)
    keeps_more = keeps != ""

    def epilogue(args, row, rows, column, columns):
        for i in range(row, row + rows):
            start = (i * args[COLUMNS] + column) * size
            C, bias, kept = args[C_] + start, args[BIAS] + column * size, args[SAVED] + start
            if has_bias:
                if keeps_more:
                    apply((C, bias, C, kept), (), columns)
                else:
                    apply((C, bias, C), (), columns)
            elif keeps_more:
                apply((C, C, kept), (), columns)
            else:
                apply((C, C), (), columns)
            if dropped:
                drop(args, floats(args[C_]), i * args[COLUMNS] + column, columns)

    return epilogue


def _backward(dtype: str, activation: str, sums: bool, dropped: bool) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu import vector_math
    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.philox import drop_row
    from backprop_kernels.cpu.vector_loop import vector_loop

    act = ACTIVATIONS[activation]
    size = 4 if dtype == "float32" else 8
    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    drop = drop_row(dtype)
    curved = activation != "identity"

    def formula(d: Any, *rest: Any) -> tuple[Any, ...]:
        g = d * act.derivative(vector_math, rest[0]) if curved else d
        return (g, rest[-1] + g) if sums else (g,)

    apply = vector_loop(formula, dtype, 1 + curved + sums)

    def epilogue(args, row, rows, column, columns):
        partial = args[PARTIAL] + (row // LEAF_ROWS * args[COLUMNS] + column) * size
        if sums:
            for j in range(columns):
                floats(partial)[j] = zero
        for i in range(row, row + rows):
            start = i * args[COLUMNS] + column
            if dropped:
                drop(args, floats(args[C_]), start, columns)
            C, saved = args[C_] + start * size, args[SAVED] + start * size
            if curved:
                if sums:
                    apply((C, saved, partial, C, partial), (), columns)
                else:
                    apply((C, saved, C), (), columns)
            elif sums:
                apply((C, partial, C, partial), (), columns)

    return epilogue


def _column_sums(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import pointer

    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)

    def finish(args, sync, thread, threads):
        partial, sums = floats(args[PARTIAL]), floats(args[SUMS])
        width = args[COLUMNS]
        low, high = thread * width // threads, (thread + 1) * width // threads
        for j in range(low, high):
            sums[j] = zero
        for block in range(args[BLOCKS]):
            for j in range(low, high):
                sums[j] = sums[j] + partial[block * width + j]

    return finish
