"""The product behind linear_forward, linear_dgrad and linear_wgrad: C = A B, then an epilogue.

M, N, K: C (M, N), A (M, K), B (K, N). One parallel phase packs what cannot be read as it lies into
panels as wide (B) or high (A) as the tile; one takes blocks of C: all of K for one block, then the
operator's epilogue on it while it is still in cache, so no activation makes a second trip through
memory. A block is computed the same way by whichever thread takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import address
from backprop_kernels.cpu.epilogue import BLOCK_ROWS
from backprop_kernels.cpu.program import Arguments, scratch, submit
from backprop_kernels.cpu.tile import host_shape

BLOCK_COLUMNS = 128  # columns of C per block, BLOCK_ROWS its rows, where C is large
TALL_ROWS = 192  # rows where B is larger than CACHED_B bytes: every block reads its columns again
CACHED_B = 2**20
ENOUGH_BLOCKS = 4  # to share; more of them read the same rows again
STRIP = 64  # rows of a matrix that one thread packs at a time
BLOCK_K = 256  # steps of K per pass: 12 rows of A then fit in half of a 32 kB L1
# Bytes from row to row up to which a matrix is read across its rows as it lies. Beyond, every step
# of K is another page and rows fall into the same cache sets: it is packed.
DIRECT = 2048

# A small C with a long K is computed as two halves of K and added: a weight gradient's two threads
# then each read the rows of the batch that they wrote. Fixed by shape, whatever the threads.
SPLIT_K = 1024
SPLIT_SIZE = 2**17  # elements of C: beyond, the second copy's trips cost more

# Slots of a product's arguments.
(PACK_TICKET, BLOCK_TICKET, M_, N_, K_, A_, A_ROW, A_K, B_, B_K, B_COLUMN, A_PANELS, DIRECT_B,
 PANELS, C_, C_ROW, ROWS, COLUMNS, SPLITS, PARTIAL, EPILOGUE, EPILOGUE_ARGS, FINISH,
) = range(23)  # fmt: skip


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
    entry, args = epilogue or (0, None)
    width, height = host_shape().columns(str(C.dtype)), host_shape().rows
    direct = int(B.strides[1] == size and B.strides[0] <= DIRECT)
    panels = scratch((1 if direct else -(-N // width), K, width), C.dtype)
    A_panels = None
    if A.strides[0] == size and A.strides[1] > DIRECT:
        A_panels = scratch((-(-M // height), K, height), C.dtype)
    rows, columns = _block(M, N, K, C.dtype, finish != 0)
    splits = 2 if epilogue is None and K >= SPLIT_K and M * N <= SPLIT_SIZE else 1
    partial = scratch((splits - 1, M, N), C.dtype)
    arguments = Arguments(
        (
            0, 0, M, N, K,
            A, A.strides[0] // size, A.strides[1] // size,
            B, B.strides[0] // size, B.strides[1] // size,
            A_panels, direct, panels, C, N, rows, columns, splits, partial, entry, args, finish,
        )
    )  # fmt: skip
    submit(address(_kernel, 4, str(C.dtype)), arguments, flops=2 * M * N * K)


def _block(M: int, N: int, K: int, dtype: Any, leaves: bool) -> tuple[int, int]:
    """Rows and columns of a block: even shares of C, enough of them for the threads.

    `leaves`: column sums are taken, so rows come in leaves of BLOCK_ROWS.
    """
    M, N = max(M, 1), max(N, 1)
    height, width = host_shape().rows, host_shape().columns(str(dtype))
    tallest = TALL_ROWS if K * N * np.dtype(dtype).itemsize > CACHED_B else BLOCK_ROWS
    down, across = -(-M // tallest), -(-N // BLOCK_COLUMNS)
    unit = BLOCK_ROWS if leaves else height
    while down * across < ENOUGH_BLOCKS:
        if across * width < N and (N * down >= M * across or down * unit >= M):
            across += 1
        elif down * unit < M:
            down += 1
        else:
            break
    return -(-M // (down * unit)) * unit, -(-N // (across * width)) * width


def _kernel(dtype: str) -> Callable[..., None]:
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import barrier, call_epilogue, call_kernel, pointer, take
    from backprop_kernels.cpu.tile import make_transpose
    from backprop_kernels.cpu.vector_loop import vector_loop

    shape = host_shape()
    lanes, width, height = shape.lanes(dtype), shape.columns(dtype), shape.rows
    size = 4 if dtype == "float32" else 8
    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    add = vector_loop(lambda x, y: (x + y,), dtype, 2)
    transpose = make_transpose(dtype, shape.vector_bytes)
    tiles_along, tiles_across = _row_of_tiles(dtype, True), _row_of_tiles(dtype, False)

    pack_B, pack_A = _pack_rows(dtype, width), _pack_rows(dtype, height)

    @numba.njit(error_model="numpy", _nrt=False)
    def pack_transposed(B, b_k, b_column, K, columns, panel):
        """One panel of a B whose columns are contiguous: squares through registers, then edges."""
        source, target = floats(B), floats(panel)
        if columns < width:
            for i in range(K * width):
                target[i] = zero
        k_squares, j_squares = K // lanes * lanes, columns // lanes * lanes
        for j in range(0, j_squares, lanes):
            for k in range(0, k_squares, lanes):
                transpose(
                    B + (j * b_column + k) * size, b_column, panel + (k * width + j) * size, width
                )
        for j in range(columns):
            for k in range(k_squares if j < j_squares else 0, K):
                target[k * width + j] = source[k * b_k + j * b_column]

    def kernel(args, sync, thread, threads):
        M, N, K = args[M_], args[N_], args[K_]
        A, a_row, a_k = args[A_], args[A_ROW], args[A_K]
        panels, C, c_row = args[PANELS], args[C_], args[C_ROW]
        panel_size = K * width * size  # bytes
        B, b_k, b_column = args[B_], args[B_K], args[B_COLUMN]
        direct = args[DIRECT_B] != 0
        first = N // width if direct else 0  # panel to pack first: the ragged one, or none
        count = (N + width - 1) // width - first
        strips = (K + STRIP - 1) // STRIP
        B_tickets = count if b_column != 1 else strips if count > 0 else 0
        A_tickets = strips if args[A_PANELS] != 0 else 0
        A_panel_size = K * height * size
        taken = 0
        while True:
            t = take(args, PACK_TICKET, B_tickets + A_tickets, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            if t >= B_tickets:
                pack_A(A, a_k, K, t - B_tickets, M, args[A_PANELS], A_panel_size)
            elif b_column == 1:
                column = first * width
                pack_B(B + column * size, b_k, K, t, N - column, panels, panel_size)
            else:
                pack_transposed(
                    B + t * width * b_column * size, b_k, b_column, K,
                    min(width, N - t * width), panels + t * panel_size,
                )  # fmt: skip
        barrier(sync, threads)
        block_rows, block_columns, splits = args[ROWS], args[COLUMNS], args[SPLITS]
        across = (N + block_columns - 1) // block_columns
        blocks = across * ((M + block_rows - 1) // block_rows)
        taken = 0
        while True:
            t = take(args, BLOCK_TICKET, blocks * splits, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            split, t = t // blocks, t % blocks
            row, column = t // across * block_rows, t % across * block_columns
            rows, columns = min(block_rows, M - row), min(block_columns, N - column)
            target = C if split == 0 else args[PARTIAL] + (split - 1) * M * N * size
            block = target + (row * c_row + column) * size
            low, high = split * K // splits, (split + 1) * K // splits
            k = low
            while k == low or k < high:  # once even for K = 0: the product is then 0
                steps, adds = min(BLOCK_K, high - k), k - low
                block_B, step_k, step = panels + column // width * panel_size, width, panel_size
                if direct:
                    block_B, step_k, step = B + column * size, b_k, width * size
                block_B += k * step_k * size
                edge = panels + (N // width - first) * panel_size + k * width * size
                for i in range(0, rows, height):
                    a, c = A + ((row + i) * a_row + k * a_k) * size, block + i * c_row * size
                    tall = min(height, rows - i)
                    if a_k == 1:
                        tiles_along(
                            a, a_row, tall, block_B, step, step_k, edge, c, c_row, steps, adds,
                            columns,
                        )  # fmt: skip
                        continue
                    a_stride = a_k
                    if A_tickets > 0:
                        panel = args[A_PANELS] + (row + i) // height * A_panel_size
                        a, a_stride = panel + k * height * size, height
                    tiles_across(
                        a, a_stride, tall, block_B, step, step_k, edge, c, c_row, steps, adds,
                        columns,
                    )  # fmt: skip
                k += BLOCK_K
            if args[EPILOGUE] != 0:
                for i in range(0, rows, BLOCK_ROWS):
                    call_epilogue(
                        args[EPILOGUE], args[EPILOGUE_ARGS], row + i, min(BLOCK_ROWS, rows - i),
                        column, columns,
                    )  # fmt: skip
        if splits > 1:
            barrier(sync, threads)
            low = thread * M // threads * N
            count = (thread + 1) * M // threads * N - low
            for split in range(1, splits):
                more = args[PARTIAL] + ((split - 1) * M * N + low) * size
                add((C + low * size, more, C + low * size), (), count)
        if args[FINISH] != 0:
            barrier(sync, threads)
            call_kernel(args[FINISH], args[EPILOGUE_ARGS], sync, thread, threads)

    return kernel


def _pack_rows(dtype: str, width: int) -> Any:
    """A Numba function: one strip of a row-major matrix into panels `width` wide, zero padded."""
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer

    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    size = 4 if dtype == "float32" else 8

    @numba.njit(error_model="numpy", _nrt=False)
    def pack(matrix, stride, K, strip, columns, panels, panel_size):
        source = floats(matrix)
        # A few rows at a time, panel by panel: both sides are then read and written in streams.
        for low in range(strip * STRIP, min((strip + 1) * STRIP, K), 16):
            high = min(low + 16, K)
            for j in range(0, columns, width):
                target = floats(panels + j // width * panel_size + low * width * size)
                for k in range(high - low):
                    start = (low + k) * stride + j
                    if j + width <= columns:
                        for i in range(width):
                            target[k * width + i] = source[start + i]
                    else:
                        for i in range(width):
                            target[k * width + i] = source[start + i] if j + i < columns else zero

    return pack


def _row_of_tiles(dtype: str, along: bool) -> Any:
    """A Numba function: C (rows ≤ tile rows, columns), one tile after another along the panels.

    `step` is from panel to panel in bytes, `panel_k` from row to row of one in elements; `edge` is
    the ragged panel at the right.
    """
    import numba

    from backprop_kernels.cpu.tile import make_tile

    shape = host_shape()
    lanes, width, height = shape.lanes(dtype), shape.columns(dtype), shape.rows
    size = 4 if dtype == "float32" else 8

    def make(rows: int, registers: int) -> Any:
        return make_tile(dtype, rows, registers, shape.vector_bytes, along)

    # Any number of rows below the tile's is a sum of 4, 2 and 1; any columns of wide and narrow.
    full, wide4, wide2, wide1 = (make(rows, shape.registers) for rows in (height, 4, 2, 1))
    slim, narrow4, narrow2, narrow1 = (make(rows, 1) for rows in (height, 4, 2, 1))

    @numba.njit(error_model="numpy", _nrt=False)
    def row_of_tiles(
        A, a_stride, rows, panels, step, panel_k, edge, C, c_row, K, adds, columns
    ):  # fmt: skip
        a_row = a_stride if along else 1
        for j in range(0, columns, width):
            left = columns - j
            B, b_k = panels + (j // width) * step, panel_k
            if left < width:
                B, b_k = edge, width
            c = C + j * size
            if rows == height:
                if left > lanes:
                    full(A, a_stride, B, b_k, c, c_row, K, adds, left)
                else:
                    slim(A, a_stride, B, b_k, c, c_row, K, adds, left)
                continue
            i = 0
            while i < rows:
                a, ci = A + i * a_row * size, c + i * c_row * size
                remaining = rows - i
                if left > lanes:
                    if remaining >= 4:
                        wide4(a, a_stride, B, b_k, ci, c_row, K, adds, left)
                    elif remaining >= 2:
                        wide2(a, a_stride, B, b_k, ci, c_row, K, adds, left)
                    else:
                        wide1(a, a_stride, B, b_k, ci, c_row, K, adds, left)
                elif remaining >= 4:
                    narrow4(a, a_stride, B, b_k, ci, c_row, K, adds, left)
                elif remaining >= 2:
                    narrow2(a, a_stride, B, b_k, ci, c_row, K, adds, left)
                else:
                    narrow1(a, a_stride, B, b_k, ci, c_row, K, adds, left)
                i += 4 if remaining >= 4 else 2 if remaining >= 2 else 1

    return row_of_tiles
