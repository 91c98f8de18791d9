"""The product behind linear_forward, linear_dgrad and linear_wgrad: C = A B, then an epilogue.

M, N, K: C (M, N), A (M, K), B (K, N). C is cut into groups, a range of rows by a range of columns,
and a group into blocks of rows. A thread takes a block at a time: for BLOCK_K steps of K it packs
the group's columns of B into panels as wide as the tile, then some rows of A, and runs the tile
over both; after the last steps comes the operator's epilogue, while those rows are still in cache,
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
from backprop_kernels.cpu.compile import Code, code
from backprop_kernels.cpu.epilogue import LEAF_ROWS
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit
from backprop_kernels.cpu.threads import available_cpus, get_num_threads
from backprop_kernels.cpu.tile import host_shape

# Steps of K per pass, about. Panels of B then stream from L2; passes so short that one of them
# stays in L1 cost more, for each reads and writes all of C.
BLOCK_K = 1024
PANELS = 2**17  # elements of B packed at a time: a quarter of a 2 MB L2
COLUMNS_OF_PACKED_A = 4  # times as many where each group of columns packs A anew
ROWS = 144  # of A per pass, between two epilogues
BLOCK_ROWS = 1024  # rows of a block where B is packed for each pass of each block
# Bytes from row to row up to which a matrix whose rows run across K is read as it lies. Beyond,
# every step of K is another page, and they fall into the same cache sets: it is packed.
DIRECT = 1024
DIRECT_K = 256  # steps of K per pass over such a matrix
LONG_K = 2048  # beyond, B comes from memory, and faster in its own order than in the tiles'
REUSED = 96  # columns of C from which packing A pays
FEW_ROWS = 16  # rows of C up to which packing B does not pay
FEW_ROWS_K = 32  # there B is read as it lies, in passes so short that its pages stay in the TLB

# A small C with a long K is computed as two halves of K and added: a weight gradient's two threads
# then each read the rows of the batch that they wrote. Fixed by shape, whatever the threads.
SPLIT_K = 1024
SPLIT_SIZE = 2**17  # elements of C: beyond, the second copy's trips cost more

# Slots of a product's arguments.
(M_, N_, K_, A_, A_ROW, A_K, B_, B_K, B_COLUMN, C_, C_ROW, PACK_A, PACK_B, PACKS_B, PASS, BUFFERS,
 BUFFER_SIZE, A_SIZE, PARTS, ACROSS, UNIT, BLOCK, SPLITS, PARTIAL, TICKETS, EPILOGUE, EPILOGUE_ARGS,
 FINISH) = range(28)  # fmt: skip
SIDES = {"A": (A_, A_ROW, A_K), "B": (B_, B_COLUMN, B_K)}


def multiply(
    A: Array,
    B: Array,
    C: Array,
    epilogue: tuple[Code, Arguments] | None = None,
    finish: Code | None = None,
) -> None:
    """Submit C = A B. `A` and `B` may be transposed views; C is C-contiguous.

    `epilogue` is (code, args): called as (args, row, rows, column, columns) for every block.
    `finish` is called once all blocks are done, by every thread: (args, sync, thread, threads).
    """
    dtype, size = str(C.dtype), C.itemsize
    M, K = A.shape
    N = B.shape[1]
    leave, args = epilogue or (None, None)
    shape = host_shape()
    lanes, width, height = shape.lanes(dtype), shape.columns(dtype), shape.rows
    most_threads = max(get_num_threads(), available_cpus())

    packs_B = B.strides[1] != size or B.strides[0] > DIRECT or K > LONG_K
    along = A.strides[1] == size
    packs_A = not along and A.strides[1] > DIRECT
    passes = max(1, round(K / (BLOCK_K if packs_B and (along or packs_A) else DIRECT_K)))
    pass_K = max(1, -(-K // (passes * lanes)) * lanes)
    if packs_B and B.strides[1] == size and M <= FEW_ROWS:
        packs_B, pass_K = False, FEW_ROWS_K
    splits = 2 if epilogue is None and K >= SPLIT_K and M * N <= SPLIT_SIZE else 1
    unit = LEAF_ROWS if finish else height  # of rows: column sums are taken leaf by leaf
    threads = -(-get_num_threads() // splits)
    group_columns = (COLUMNS_OF_PACKED_A if packs_A else 1) * PANELS // pass_K
    parts, across, block = _divide(M, N, threads, packs_B, group_columns, passes > 1, unit, width)
    packs_A = packs_A and N // across >= REUSED

    # What each thread packs, for one pass: rows of A, then its group's columns of B.
    A_size = packs_A * (min(block, ROWS) + height) * min(K, pass_K) * size
    panels = -(-N // (across * width)) if packs_B else 1
    B_size = panels * min(K, pass_K) * width * size
    buffers = scratch((most_threads, A_size + B_size), np.uint8)
    partial = scratch((splits - 1, M, N), C.dtype)
    tickets = np.zeros(splits * parts * across, np.int64)
    arguments = Arguments(
        (
            M, N, K,
            A, A.strides[0] // size, A.strides[1] // size,
            B, B.strides[0] // size, B.strides[1] // size, C, N,
            code(_pack, 6, dtype, "A") if packs_A else None, code(_pack, 6, dtype, "B"),
            packs_B, pass_K, buffers, A_size + B_size, A_size,
            parts, across, unit, block, splits, partial, tickets, leave, args, finish,
        )
    )  # fmt: skip
    entry = code(_kernel, 4, dtype, along)
    submit(Kernel(entry, arguments, 2 * M * N * K, tickets, most_threads))


def _divide(
    M: int, N: int, threads: int, packs_B: bool, group_columns: int, many_passes: bool,
    unit: int, width: int,
) -> tuple[int, int, int]:  # fmt: skip
    """How C is cut: parts of its rows, parts across, rows of a block.

    Threads share A or B: by columns each packs its own part of B and reads all of A, by rows the
    reverse.
    """
    units, panels = max(1, -(-M // unit)), max(1, -(-N // width))
    across = -(-N // group_columns)
    by_rows = M >= 4 * N if packs_B else M > N
    if not by_rows:
        across = -(-across // threads) * threads
    across = max(1, min(across, panels))
    parts = min(units, threads if by_rows else -(-threads // across))
    share = -(-units // parts) * unit
    blocks = -(-share // (BLOCK_ROWS if packs_B and many_passes else ROWS))
    if not packs_B:  # a thread that helps packs nothing twice: cut finer
        blocks = max(blocks, -(-4 * threads // (parts * across)))
    return parts, across, -(-share // (blocks * unit)) * unit


def _kernel(dtype: str, along: bool) -> Callable[..., None]:
    """`along`: whether the rows of A run along K."""
    from numba import types

    from backprop_kernels.cpu.memory import (
        address_of,
        atomic_add,
        barrier,
        call_epilogue,
        call_kernel,
        call_pack,
        int64s,
    )
    from backprop_kernels.cpu.vector_loop import vector_loop

    shape = host_shape()
    width, size = shape.columns(dtype), getattr(types, dtype).bitwidth // 8
    add = vector_loop(lambda x, y: (x + y,), dtype, 2)
    multiply_panels = _multiply_panels(dtype, along)

    def kernel(args, sync, thread, threads):
        M, N, K = args[M_], args[N_], args[K_]
        A_panels = args[BUFFERS] + thread * args[BUFFER_SIZE]
        B_panels = A_panels + args[A_SIZE]
        parts, across, splits = args[PARTS], args[ACROSS], args[SPLITS]
        unit, tickets = args[UNIT], int64s(args[TICKETS])
        units, panels = (M + unit - 1) // unit, (N + width - 1) // width
        groups = splits * parts * across
        packed = -1
        for turn in range(groups):
            group = (thread * groups // threads + turn) % groups
            j, part, split = group % across, group // across % parts, group // across // parts
            top, bottom = part * units // parts * unit, min((part + 1) * units // parts * unit, M)
            left = j * panels // across * width
            columns = min((j + 1) * panels // across * width, N) - left
            direct = 0 if args[PACKS_B] != 0 else columns // width * width  # then a ragged panel
            low, high = split * K // splits, (split + 1) * K // splits
            C = args[C_] if split == 0 else args[PARTIAL] + (split - 1) * M * N * size
            while True:
                start = top + atomic_add(tickets, group, 1) * args[BLOCK]
                if start >= bottom:
                    break
                stop = min(start + args[BLOCK], bottom)
                for k in range(low, max(high, low + 1), args[PASS]):  # once for K = 0: C is then 0
                    steps = min(args[PASS], high - k)
                    if packed != k * across + j:
                        packed = k * across + j
                        call_pack(
                            args[PACK_B], address_of(args), left + direct, columns - direct, k,
                            steps, B_panels,
                        )  # fmt: skip
                    for row in range(start, stop, ROWS):
                        rows = min(ROWS, stop - row)
                        if args[PACK_A] != 0:
                            call_pack(args[PACK_A], address_of(args), row, rows, k, steps, A_panels)
                        multiply_panels(
                            args, C, row, rows, left, columns, k, steps, k - low, direct, A_panels
                        )
                        if args[EPILOGUE] != 0 and k + steps == high:
                            for i in range(row, row + rows, LEAF_ROWS):
                                call_epilogue(
                                    args[EPILOGUE], args[EPILOGUE_ARGS], i,
                                    min(LEAF_ROWS, row + rows - i), left, columns,
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


def _multiply_panels(dtype: str, along: bool) -> Any:
    """A Numba function: C (+)= A B of some rows, a group's columns and one pass over K."""
    import numba
    from numba import types

    shape = host_shape()
    width, height = shape.columns(dtype), shape.rows
    size = getattr(types, dtype).bitwidth // 8
    tile = _any_tile(dtype, along)

    @numba.njit(error_model="numpy", _nrt=False, inline="always")
    def multiply_panels(args, C, row, rows, left, columns, k, steps, adds, direct, A_panels):
        a_row, a_k, c_row = args[A_ROW], args[A_K], args[C_ROW]
        A, a_panel, a_step = args[A_] + (row * a_row + k * a_k) * size, a_row * height * size, a_k
        if along:
            a_step = a_row
        elif args[PACK_A] != 0:
            A, a_panel, a_step = A_panels, steps * height * size, height
        B = args[B_] + (k * args[B_K] + left * args[B_COLUMN]) * size
        B_panels = A_panels + args[A_SIZE]
        C += (row * c_row + left) * size
        A_count, B_count = (rows + height - 1) // height, (columns + width - 1) // width
        # Either a panel of A stays in L1 while the group's of B pass by in L2, or, where A is
        # packed for more columns than L2 holds of B, one of B stays in L2 while those of A pass by.
        B_stays = args[PACKS_B] != 0 and not along
        inner = A_count if B_stays else B_count
        for n in range(A_count * B_count):
            p, i = n // inner, n % inner
            if not B_stays:
                p, i = i, p
            j = p * width
            b, b_step = B + j * size, args[B_K]
            if j >= direct:
                b, b_step = B_panels + (j - direct) * steps * size, width
            a, a_rows = A + i * a_panel, min(height, rows - i * height)
            c = C + (i * height * c_row + j) * size
            tile(a, a_step, a_rows, b, b_step, c, c_row, steps, adds, columns - j)

    return multiply_panels


def _pack(dtype: str, side: str) -> Callable[..., None]:
    """Some rows of A or columns of B, for some steps of K, into panels for the tile."""
    from numba import types

    shape = host_shape()
    pack = make_pack(dtype, shape.rows if side == "A" else shape.columns(dtype))
    matrix, along, down = SIDES[side]
    size = getattr(types, dtype).bitwidth // 8

    def packer(args, first, count, k, steps, panels):
        stride, k_stride = args[along], args[down]
        source = args[matrix] + (first * stride + k * k_stride) * size
        pack(source, k_stride, stride, steps, count, panels)

    return packer


def make_pack(dtype: str, width: int) -> Any:
    """A Numba function: a matrix (K, columns) into panels (columns / width, K, width), zero padded.

    k_stride, stride: from one step of K and one column to the next; one of the two is 1.
    """
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.tile import make_transpose
    from backprop_kernels.cpu.vector_loop import vector_loop

    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    size = getattr(types, dtype).bitwidth // 8
    copy = vector_loop(lambda x: (x,), dtype, 1)
    shape = host_shape()
    lanes = shape.lanes(dtype)
    group = min(lanes, width)  # columns that go through the registers together; then the rest
    rest = width % group
    transpose = make_transpose(dtype, group, shape.vector_bytes)
    transpose_rest = make_transpose(dtype, max(rest, 1), shape.vector_bytes)

    @numba.njit(error_model="numpy", _nrt=False)
    def pack(matrix, k_stride, stride, K, columns, panels):
        if stride == 1:
            # A few rows at a time, panel by panel: both sides are then read and written in streams.
            for low in range(0, K, 16):
                for j in range(0, columns, width):
                    for k in range(low, min(low + 16, K)):
                        row = matrix + (k * k_stride + j) * size
                        target = panels + (j * K + k * width) * size
                        copy((row, target), (), min(width, columns - j))
                        for i in range(columns - j, width):
                            floats(target)[i] = zero
            return
        source = floats(matrix)
        for j in range(0, columns, width):
            panel = panels + j * K * size
            squares = K // lanes * lanes if j + width <= columns else 0
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
    four, two, one = (make_tile(dtype, n, shape.registers, simple, along) for n in (4, 2, 1))

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
            if rows >= 4:
                four(A, a_stride, B, b_k, C, c_row, K, adds, columns)
                done = 4
            elif rows >= 2:
                two(A, a_stride, B, b_k, C, c_row, K, adds, columns)
                done = 2
            else:
                one(A, a_stride, B, b_k, C, c_row, K, adds, columns)
                done = 1
            A, C, rows = A + done * a_row * size, C + done * c_row * size, rows - done

    return tile
