"""The product behind linear_forward, linear_dgrad and linear_wgrad: C = A B, then an epilogue.

M, N, K: C (M, N), A (M, K), B (K, N), each with any strides. One parallel phase packs B into
panels as wide as the tile (and A into panels as high, where its columns are contiguous: row-major A
is read as it lies), one takes blocks of C: all of K for one block, then the operator's epilogue
on it while it is still in cache, so no activation makes a second trip through memory.
Blocks have a fixed size, and each is computed the same way by whichever thread takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import address
from backprop_kernels.cpu.epilogue import BLOCK_ROWS
from backprop_kernels.cpu.program import Arguments, scratch, submit
from backprop_kernels.cpu.tile import host_shape

BLOCK_N = 256  # columns of C per block: enough blocks for both cores at width 1024
BLOCK_K = 256  # steps of K per pass: 12 rows of A then fit in half of a 32 kB L1

# Slots of a product's arguments.
(PACK_TICKET, BLOCK_TICKET, M_, N_, K_, A_, A_ROW, A_K, B_, B_K, B_COLUMN, A_PANELS, PANELS,
 C_, C_ROW, EPILOGUE, EPILOGUE_ARGS, FINISH) = range(18)  # fmt: skip


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
    width = panel_columns(C.dtype)
    panels = scratch((-(-N // width), K, width), C.dtype)
    height = host_shape().rows
    # Reading a row-major A along K is as fast as reading panels; reading it across is not.
    A_panels = scratch((-(-M // height), K, height), C.dtype) if A.strides[0] == size else None
    arguments = Arguments(
        (
            0, 0, M, N, K,
            A, A.strides[0] // size, A.strides[1] // size,
            B, B.strides[0] // size, B.strides[1] // size,
            A_panels, panels, C, N, entry, args, finish,
        )
    )  # fmt: skip
    submit(address(_kernel, 4, str(C.dtype)), arguments, flops=2 * M * N * K)


def panel_columns(dtype: Any) -> int:
    """The width of a packed panel."""
    return host_shape().columns(str(dtype))


def _kernel(dtype: str) -> Callable[..., None]:
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import barrier, call_epilogue, call_kernel, pointer, ticket
    from backprop_kernels.cpu.tile import make_tile, make_transpose

    shape = host_shape()
    lanes, width, height = shape.lanes(dtype), shape.columns(dtype), shape.rows
    size = 4 if dtype == "float32" else 8
    floats = pointer(getattr(types, dtype))
    zero = getattr(types, dtype)(0)
    # Heights that any number of rows below the tile's is a sum of.
    tiles = {
        (rows, registers): make_tile(dtype, rows, registers, shape.vector_bytes)
        for rows in {height, 4, 2, 1}
        for registers in {shape.registers, 1}
    }  # fmt: skip
    transpose = make_transpose(dtype, shape.vector_bytes)
    full, narrow = tiles[height, shape.registers], tiles[height, 1]
    full4, full2, full1 = (tiles[r, shape.registers] for r in (4, 2, 1))
    narrow4, narrow2, narrow1 = (tiles[r, 1] for r in (4, 2, 1))

    @numba.njit(error_model="numpy", _nrt=False)
    def pack_panel(B, b_k, b_column, K, columns, panel):
        """One panel: (K, width), zero beyond `columns`."""
        source, target = floats(B), floats(panel)
        if columns < width:
            for i in range(K * width):
                target[i] = zero
        if b_column == 1:
            for k in range(K):
                for j in range(columns):
                    target[k * width + j] = source[k * b_k + j]
            return
        # B's columns are contiguous: squares through registers, the edges one by one.
        k_squares, j_squares = K // lanes * lanes, columns // lanes * lanes
        for j in range(0, j_squares, lanes):
            for k in range(0, k_squares, lanes):
                transpose(
                    B + (j * b_column + k) * size, b_column, panel + (k * width + j) * size, width
                )
        for j in range(columns):
            for k in range(k_squares if j < j_squares else 0, K):
                target[k * width + j] = source[k * b_k + j * b_column]

    @numba.njit(error_model="numpy", _nrt=False)
    def pack_rows(A, a_k, K, rows, panel):
        """One panel of A whose columns are contiguous: (K, tile rows)."""
        source, target = floats(A), floats(panel)
        for k in range(K):
            if rows == height:
                for i in range(height):
                    target[k * height + i] = source[k * a_k + i]
            else:
                for i in range(rows):
                    target[k * height + i] = source[k * a_k + i]

    @numba.njit(error_model="numpy", _nrt=False)
    def row_of_tiles(A, a_row, a_k, rows, panels, panel_size, C, c_row, K, adds, columns):
        """C (rows ≤ tile rows, columns), one tile after another along the panels."""
        for j in range(0, columns, width):
            left = columns - j
            B = panels + (j // width) * panel_size
            c = C + j * size
            if rows == height:
                if left > lanes:
                    full(A, a_row, a_k, B, width, c, c_row, K, adds, left)
                else:
                    narrow(A, a_row, a_k, B, width, c, c_row, K, adds, left)
                continue
            i = 0
            while i < rows:
                a, ci = A + i * a_row * size, c + i * c_row * size
                remaining = rows - i
                if left > lanes:
                    if remaining >= 4:
                        full4(a, a_row, a_k, B, width, ci, c_row, K, adds, left)
                    elif remaining >= 2:
                        full2(a, a_row, a_k, B, width, ci, c_row, K, adds, left)
                    else:
                        full1(a, a_row, a_k, B, width, ci, c_row, K, adds, left)
                elif remaining >= 4:
                    narrow4(a, a_row, a_k, B, width, ci, c_row, K, adds, left)
                elif remaining >= 2:
                    narrow2(a, a_row, a_k, B, width, ci, c_row, K, adds, left)
                else:
                    narrow1(a, a_row, a_k, B, width, ci, c_row, K, adds, left)
                i += 4 if remaining >= 4 else 2 if remaining >= 2 else 1

    def kernel(args, sync, thread, threads):
        M, N, K = args[M_], args[N_], args[K_]
        A, a_row, a_k = args[A_], args[A_ROW], args[A_K]
        panels, C, c_row = args[PANELS], args[C_], args[C_ROW]
        panel_size = K * width * size  # bytes
        count = (N + width - 1) // width
        row_panels = (M + height - 1) // height if args[A_PANELS] != 0 else 0
        row_panel_size = K * height * size
        while True:
            t = ticket(args, PACK_TICKET, threads)
            if t >= count + row_panels:
                break
            if t >= count:
                row = (t - count) * height
                pack_rows(
                    A + row * size, a_k, K, min(height, M - row),
                    args[A_PANELS] + (t - count) * row_panel_size,
                )  # fmt: skip
                continue
            column = t * width
            pack_panel(
                args[B_] + column * args[B_COLUMN] * size, args[B_K], args[B_COLUMN], K,
                min(width, N - column), panels + t * panel_size,
            )  # fmt: skip
        barrier(sync, threads)
        across = (N + BLOCK_N - 1) // BLOCK_N
        blocks = across * ((M + BLOCK_ROWS - 1) // BLOCK_ROWS)
        while True:
            t = ticket(args, BLOCK_TICKET, threads)
            if t >= blocks:
                break
            row, column = t // across * BLOCK_ROWS, t % across * BLOCK_N
            rows, columns = min(BLOCK_ROWS, M - row), min(BLOCK_N, N - column)
            block = C + (row * c_row + column) * size
            k = 0
            while k == 0 or k < K:  # once even for K = 0: the product is then 0
                steps = min(BLOCK_K, K - k)
                B = panels + (column // width) * panel_size + k * width * size
                for i in range(0, rows, height):
                    a, step_row, step_k = A + ((row + i) * a_row + k * a_k) * size, a_row, a_k
                    if row_panels > 0:
                        panel = args[A_PANELS] + (row + i) // height * row_panel_size
                        a, step_row, step_k = panel + k * height * size, 1, height
                    row_of_tiles(
                        a, step_row, step_k, min(height, rows - i), B, panel_size,
                        block + i * c_row * size, c_row, steps, k, columns,
                    )  # fmt: skip
                k += BLOCK_K
            if args[EPILOGUE] != 0:
                call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], row, rows, column, columns)
        if args[FINISH] != 0:
            barrier(sync, threads)
            call_kernel(args[FINISH], args[EPILOGUE_ARGS], sync, thread, threads)

    return kernel
