"""The product behind linear_forward, linear_dgrad and linear_wgrad: C = A B, then an epilogue.

M, N, K: C (M, N), A (M, K), B (K, N). C is cut into groups, a range of rows by a range of columns,
and a group into blocks of rows. A thread packs the group's columns of B into panels as wide as the
tile, for itself, and then takes blocks: for BLOCK_K steps of K at a time it packs the block's rows
of A and runs the tile over both; then the operator's epilogue, while the block is still in cache,
so no activation makes a second trip through memory. Every thread begins with groups of its own, so
that it meets rows that it wrote, and then helps with the others'. An element of C is computed the
same way whoever computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import address
from backprop_kernels.cpu.epilogue import LEAF_ROWS
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit
from backprop_kernels.cpu.threads import available_cpus, get_num_threads
from backprop_kernels.cpu.tile import host_shape

BLOCK_K = 192  # steps of K per pass: a panel of B then stays in L1 below all rows of the block
BLOCK_ROWS = 144  # rows of A per pass: with them, C and the next panels fit in half of a 2 MB L2
GROUP_COLUMNS = 1024  # of C: beyond, a block of C leaves the cache between passes
# Bytes from row to row up to which a matrix is read as it lies. Beyond, every row is another page
# and rows fall into the same cache sets: it is packed.
DIRECT = 2048
REUSED = 256  # columns of C from which packing A pays
FEW_ROWS = 16  # rows of C up to which packing B does not pay
FEW_ROWS_K = 32  # there B is read as it lies, in passes so short that its pages stay in the TLB

# A small C with a long K is computed as two halves of K and added: a weight gradient's two threads
# then each read the rows of the batch that they wrote. Fixed by shape, whatever the threads.
SPLIT_K = 1024
SPLIT_SIZE = 2**17  # elements of C: beyond, the second copy's trips cost more

# Slots of a product's arguments.
(M_, N_, K_, A_, A_ROW, A_K, B_, B_K, B_COLUMN, C_, C_ROW, PACKS_A, PACKS_B, PASS, BUFFERS,
 BUFFER_SIZE, A_SIZE, PARTS, ACROSS, UNIT, TALL, SPLITS, PARTIAL, TICKETS, EPILOGUE, EPILOGUE_ARGS,
 FINISH) = range(27)  # fmt: skip


def multiply(
    A: Array, B: Array, C: Array, epilogue: tuple[int, Arguments] | None = None, finish: int = 0
) -> None:
    """Submit C = A B. `A` and `B` may be transposed views; C is C-contiguous.

    `epilogue` is (address, args): called as (args, row, rows, column, columns) for every block.
    `finish` is called once all blocks are done, by every thread: (args, sync, thread, threads).
    """
    size = C.itemsize
    M, K = A.shape
    N = B.shape[1]
    leave, args = epilogue or (0, None)
    shape = host_shape()
    lanes, width, height = shape.lanes(str(C.dtype)), shape.columns(str(C.dtype)), shape.rows
    most_threads = max(get_num_threads(), available_cpus())

    packs_B, pass_K = B.strides[1] != size or B.strides[0] > DIRECT, BLOCK_K
    if packs_B and B.strides[1] == size and M <= FEW_ROWS:
        packs_B, pass_K = False, FEW_ROWS_K
    splits = 2 if epilogue is None and K >= SPLIT_K and M * N <= SPLIT_SIZE else 1
    unit = LEAF_ROWS if finish else height  # of rows: column sums are taken leaf by leaf
    parts, across, tall = _divide(M, N, -(-get_num_threads() // splits), packs_B, unit, width)
    packs_A = max(A.strides) > DIRECT and N // across >= REUSED

    # What each thread packs: a block of A for one pass, then its group's columns of B.
    A_size = packs_A * (tall + height) * min(K, pass_K) * size
    columns = -(-N // (across * lanes)) * lanes
    B_size = (-(-columns // width) if packs_B else 1) * K * width * size
    buffers = scratch((most_threads, A_size + B_size), np.uint8)
    partial = scratch((splits - 1, M, N), C.dtype)
    tickets = np.zeros(splits * parts * across, np.int64)
    arguments = Arguments(
        (
            M, N, K,
            A, A.strides[0] // size, A.strides[1] // size,
            B, B.strides[0] // size, B.strides[1] // size, C, N,
            packs_A, packs_B, pass_K, buffers, A_size + B_size, A_size,
            parts, across, unit, tall, splits, partial, tickets, leave, args, finish,
        )
    )  # fmt: skip
    entry = address(_kernel, 4, str(C.dtype))
    submit(Kernel(entry, arguments, 2 * M * N * K, tickets, most_threads))


def _divide(
    M: int, N: int, threads: int, packs_B: bool, unit: int, width: int
) -> tuple[int, int, int]:
    """How C is cut: parts of its rows, parts across, rows of a block.

    Threads share A or B: by columns each packs its own part of B and reads all of A, by rows the
    reverse.
    """
    units, panels = max(1, -(-M // unit)), max(1, -(-N // width))
    across = -(-N // GROUP_COLUMNS)
    by_rows = M >= 4 * N if packs_B else M > N
    if not by_rows:
        across = -(-across // threads) * threads
    across = max(1, min(across, panels))
    parts = min(units, threads if by_rows else -(-threads // across))
    share = -(-units // parts) * unit
    blocks = -(-share // BLOCK_ROWS)
    if not packs_B:  # a thread that helps packs nothing twice: cut finer
        blocks = max(blocks, -(-4 * threads // (parts * across)))
    return parts, across, -(-share // (blocks * unit)) * unit


def _kernel(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import (
        atomic_add,
        barrier,
        call_epilogue,
        call_kernel,
        int64s,
        prefetch,
    )
    from backprop_kernels.cpu.vector_loop import vector_loop

    shape = host_shape()
    lanes, width, height = shape.lanes(dtype), shape.columns(dtype), shape.rows
    size = getattr(types, dtype).bitwidth // 8
    add = vector_loop(lambda x, y: (x + y,), dtype, 2)
    tile_along, tile_across = _any_tile(dtype, True), _any_tile(dtype, False)
    pack_rows_A, pack_rows_B = _pack_rows(dtype, height), _pack_rows(dtype, width)
    pack_columns_A, pack_columns_B = _pack_columns(dtype, height), _pack_columns(dtype, width)

    def kernel(args, sync, thread, threads):
        M, N, K = args[M_], args[N_], args[K_]
        A, a_row, a_k = args[A_], args[A_ROW], args[A_K]
        B, b_k, b_column = args[B_], args[B_K], args[B_COLUMN]
        c_row, pass_K = args[C_ROW], args[PASS]
        packs_A, packs_B = args[PACKS_A] != 0, args[PACKS_B] != 0
        A_panels = args[BUFFERS] + thread * args[BUFFER_SIZE]
        B_panels = A_panels + args[A_SIZE]
        along, a_step = a_k == 1 and not packs_A, height if packs_A else a_k
        panel_size = K * width * size
        parts, across, splits = args[PARTS], args[ACROSS], args[SPLITS]
        unit, tall, tickets = args[UNIT], args[TALL], int64s(args[TICKETS])
        units, slices = (M + unit - 1) // unit, (N + lanes - 1) // lanes
        groups = splits * parts * across
        packed = -1
        for turn in range(groups):
            group = (thread * groups // threads + turn) % groups
            j, part, split = group % across, group // across % parts, group // across // parts
            top, bottom = part * units // parts * unit, min((part + 1) * units // parts * unit, M)
            left = j * slices // across * lanes
            columns = min((j + 1) * slices // across * lanes, N) - left
            low, high = split * K // splits, (split + 1) * K // splits
            C = args[C_] if split == 0 else args[PARTIAL] + (split - 1) * M * N * size
            blocks = (bottom - top + tall - 1) // tall
            direct = 0 if packs_B else columns // width * width  # the ragged panel is packed always
            while True:
                block = atomic_add(tickets, group, 1)
                if block >= blocks:
                    break
                if packed != j:
                    packed = j
                    b = B + (left + direct) * b_column * size
                    if b_column == 1:
                        pack_rows_B(b, b_k, K, columns - direct, B_panels)
                    else:
                        pack_columns_B(b, b_column, K, columns - direct, B_panels)
                row = top + block * tall
                rows = min(tall, bottom - row)
                A_count, B_count = (rows + height - 1) // height, (columns + width - 1) // width
                k = low
                while k == low or k < high:  # once even for K = 0: the product is then 0
                    steps, adds = min(pass_K, high - k), k - low
                    block_A, a_panel = A + (row * a_row + k * a_k) * size, a_row * height * size
                    if packs_A:
                        if a_k == 1:
                            pack_columns_A(block_A, a_row, steps, rows, A_panels)
                        else:
                            pack_rows_A(block_A, a_k, steps, rows, A_panels)
                        block_A, a_panel = A_panels, steps * height * size
                    # A packed panel of B stays in L1 while those of A pass by; one that is read as
                    # it lies does not fit there, for its rows share cache sets: A then stays.
                    outer, inner = (B_count, A_count) if packs_B else (A_count, B_count)
                    for n in range(outer * inner):
                        p, i = n // inner, n % inner
                        if not packs_B:
                            p, i = i, p
                        b, step = B + (k * b_k + left + p * width) * size, b_k
                        if p * width >= direct:
                            b, step = B_panels + (p * width - direct) * K * size, width
                            b += k * width * size
                        if packs_B:
                            # The next panel is on its way from a further cache meanwhile.
                            ahead = b + panel_size
                            if p + 1 == B_count:
                                ahead = B_panels + (k + steps) % K * width * size
                            count = steps * width * size
                            for line in range(i * count // A_count, (i + 1) * count // A_count, 64):
                                prefetch(ahead + line)
                        a, a_rows = block_A + i * a_panel, min(height, rows - i * height)
                        c = C + ((row + i * height) * c_row + left + p * width) * size
                        n_columns = columns - p * width
                        if along:
                            tile_along(a, a_row, a_rows, b, step, c, c_row, steps, adds, n_columns)
                        else:
                            tile_across(
                                a, a_step, a_rows, b, step, c, c_row, steps, adds, n_columns
                            )
                    k += pass_K
                if args[EPILOGUE] != 0:
                    for i in range(row, row + rows, LEAF_ROWS):
                        call_epilogue(
                            args[EPILOGUE], args[EPILOGUE_ARGS], i, min(LEAF_ROWS, row + rows - i),
                            left, columns,
                        )  # fmt: skip
        if splits > 1:
            barrier(sync, threads)
            low = thread * M // threads * N
            count = (thread + 1) * M // threads * N - low
            C = args[C_] + low * size
            for split in range(1, splits):
                more = args[PARTIAL] + ((split - 1) * M * N + low) * size
                add((C, more, C), (), count)
        if args[FINISH] != 0:
            barrier(sync, threads)
            call_kernel(args[FINISH], args[EPILOGUE_ARGS], sync, thread, threads)

    return kernel


def _pack_rows(dtype: str, width: int) -> Any:
    """A Numba function: a matrix whose rows are contiguous into panels `width` wide, zero padded.

    matrix (K, columns), `stride` from row to row; panels (columns / width, K, width).
    """
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.vector_loop import vector_loop

    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    size = getattr(types, dtype).bitwidth // 8
    copy = vector_loop(lambda x: (x,), dtype, 1)

    @numba.njit(error_model="numpy", _nrt=False)
    def pack(matrix, stride, K, columns, panels):
        # A few rows at a time, panel by panel: both sides are then read and written in streams.
        for low in range(0, K, 16):
            for j in range(0, columns, width):
                for k in range(low, min(low + 16, K)):
                    source = matrix + (k * stride + j) * size
                    target = panels + (j * K + k * width) * size
                    if j + width <= columns:
                        copy((source, target), (), width)
                    else:
                        copy((source, target), (), columns - j)
                        for i in range(columns - j, width):
                            floats(target)[i] = zero

    return pack


def _pack_columns(dtype: str, width: int) -> Any:
    """A Numba function like pack_rows', of a matrix whose columns are contiguous.

    matrix (K, columns), `stride` from column to column.
    """
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.tile import make_transpose

    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    size = getattr(types, dtype).bitwidth // 8
    shape = host_shape()
    lanes = shape.lanes(dtype)
    group = min(lanes, width)  # columns that go through the registers together; then the rest
    rest = width % group
    transpose = make_transpose(dtype, group, shape.vector_bytes)
    transpose_rest = make_transpose(dtype, max(rest, 1), shape.vector_bytes)

    @numba.njit(error_model="numpy", _nrt=False)
    def pack(matrix, stride, K, columns, panels):
        source = floats(matrix)
        for j in range(0, columns, width):
            panel = panels + j * K * size
            squares = 0
            if j + width <= columns:
                squares = K // lanes * lanes
                for i in range(0, width - rest, group):
                    for k in range(0, squares, lanes):
                        block = matrix + ((j + i) * stride + k) * size
                        transpose(block, stride, panel + (k * width + i) * size, width)
                if rest > 0:
                    i = width - rest
                    for k in range(0, squares, lanes):
                        block = matrix + ((j + i) * stride + k) * size
                        transpose_rest(block, stride, panel + (k * width + i) * size, width)
            target = floats(panel)
            for i in range(width):
                for k in range(squares, K):
                    inside = j + i < columns
                    target[k * width + i] = source[(j + i) * stride + k] if inside else zero

    return pack


def _any_tile(dtype: str, along: bool) -> Any:
    """A Numba function: one tile of C, of up to as many rows and columns as the registers hold."""
    import numba

    from backprop_kernels.cpu.tile import make_tile

    shape = host_shape()
    lanes, height = shape.lanes(dtype), shape.rows
    size = shape.vector_bytes // lanes
    three = shape.registers > 2

    full = make_tile(dtype, height, shape.registers, shape, along)
    medium = make_tile(dtype, height, 2, shape, along)
    # Of the other tiles there are few in a product: not unrolled, they compile in half the time.
    simple = replace(shape, unroll=1)
    slim = make_tile(dtype, height, 1, simple, along)
    # Any number of rows below the tile's is a sum of 4, 2 and 1.
    wide4, wide2, wide1 = (
        make_tile(dtype, rows, shape.registers, simple, along) for rows in (4, 2, 1)
    )
    slim4, slim2, slim1 = (make_tile(dtype, rows, 1, simple, along) for rows in (4, 2, 1))

    @numba.njit(error_model="numpy", _nrt=False)
    def tile(A, a_stride, rows, B, b_k, C, c_row, K, adds, columns):
        if rows == height:
            if columns <= lanes:
                slim(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            elif three and columns <= 2 * lanes:
                medium(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            else:
                full(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            return
        a_row = a_stride if along else 1
        while rows > 0:
            if columns > lanes:
                if rows >= 4:
                    wide4(A, a_stride, B, b_k, C, c_row, K, adds, columns)
                elif rows >= 2:
                    wide2(A, a_stride, B, b_k, C, c_row, K, adds, columns)
                else:
                    wide1(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            elif rows >= 4:
                slim4(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            elif rows >= 2:
                slim2(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            else:
                slim1(A, a_stride, B, b_k, C, c_row, K, adds, columns)
            done = 4 if rows >= 4 else 2 if rows >= 2 else 1
            A, C, rows = A + done * a_row * size, C + done * c_row * size, rows - done

    return tile
