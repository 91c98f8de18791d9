"""Bugs for the sources of Hopper's products, and the checks that must notice them."""

from __future__ import annotations

from functools import partial

import numpy as np
from backprop_kernels import reference
from backprop_kernels.arrays import Array
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.tiles import Tile
from backprop_kernels.cuda.transpose import padded, transposed
from backprop_kernels.precisions import round_to, widen

from tests.cuda_host import hopper
from tests.cuda_host.backend import installed
from tests.cuda_host.mutants import F32, Mutant, normal, whole
from tests.cuda_host.product_mutants import mixed, rounded


def products(tile: Tile, precision: str = "bf16") -> None:
    """Ragged in every way, more tiles than blocks, more strips than stages, batches in runs."""
    with hopper.on_hopper(tile):
        for batch, inside, outside in ((200, 72, 136), (136, 264, 24)):
            X, W, dZ = whole((batch, inside), (outside, inside), (batch, outside))
            b = whole((outside,))[0]
            Y = np.empty((batch, outside), F32)
            given = round_to(X, precision), round_to(W, precision)
            mixed(precision).linear_forward(*given, b, out=(Y, None))
            np.testing.assert_array_equal(Y, X @ W.T + b)
            rounded(precision, "linear_wgrad", dZ, X)
            rounded(precision, "linear_dgrad", np.sign(dZ), np.sign(W))


def in_runs() -> None:
    """A batch in runs that take turns at a tile, in two blocks and more."""
    dZ, X = whole((200, 24), (200, 72))
    with hopper.on_hopper(hopper.SHARED):
        rounded("bf16", "linear_wgrad", dZ, X)


def shared() -> None:
    products(hopper.SHARED)


def in_clusters() -> None:
    products(hopper.IN_CLUSTERS)


def in_turn() -> None:
    products(hopper.IN_TURN)


def tall() -> None:
    products(hopper.TALL_IN_TURN)


def halves() -> None:
    """float16, whose bits are no bfloat16."""
    products(hopper.SHARED, "fp16")


def tf32() -> None:
    products(hopper.SHARED, "tf32")


def nearest(x: Array) -> Array:
    """The nearest tf32, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & ~np.uint32(0x1FFF)).view(F32)


def written_twice() -> None:
    """What the next products read: rounded; and the transpose, with nothing beside it."""
    for batch, inside, outside in ((67, 36, 140), (130, 8, 40)):
        X, W = whole((batch, inside), (outside, inside))
        W *= 100  # so that products have more than 11 bits
        expected = np.full((outside, padded(batch) + 4), np.nan, F32)
        expected[:, :batch] = nearest(X @ W.T).T
        with installed(), hopper.on_hopper(hopper.SHARED):
            import cupy

            room = cupy.asarray(np.full(expected.shape, np.nan, F32))
            copy = room[:, :batch]
            Y, _ = InPrecision("tf32").linear_forward(
                cupy.asarray(X), cupy.asarray(W), Y_rounded=True, copy=copy
            )
            np.testing.assert_array_equal(Y.get(), expected[:, :batch].T)
            np.testing.assert_array_equal(room.get(), expected)


def transposes() -> None:
    """Ragged, several tiles down and across."""
    for rows, columns in ((67, 45), (1, 40), (33, 1)):
        matrix = normal((rows, columns))[0]
        expected = np.full((columns, padded(rows) + 4), np.nan, F32)
        expected[:, :rows] = nearest(matrix).T
        with installed():
            import cupy

            room = cupy.asarray(np.full(expected.shape, np.nan, F32))
            transposed(cupy.asarray(matrix), room[:, :rows])
            np.testing.assert_array_equal(room.get(), expected)


def bits() -> None:
    """A vote of whole warps, at the edge of a row of tiles as well."""
    X, W = whole((70, 8), (40, 8))
    with hopper.on_hopper(hopper.SHARED):
        given = round_to(X, "bf16"), round_to(W, "bf16")
        _, saved = mixed("bf16").linear_forward(*given, None, "relu")
    Z, _ = reference.linear_forward(X.astype(float), W.astype(float))
    expected = np.zeros((70, 64), bool)
    expected[:, :40] = Z > 0
    got = np.unpackbits(np.ascontiguousarray(saved).view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(got, expected)


def derivatives() -> None:
    """Of what was saved, each at its own element, up to the last one before the guard page."""
    dZ, W, Z = whole((70, 8), (8, 40), (70, 40))
    with hopper.on_hopper(hopper.SHARED):
        given = (round_to(a, "bf16") for a in (dZ, W, Z))
        dZ_prev, _ = mixed("bf16").linear_dgrad(*given, "softsign")
    exact, _ = reference.linear_dgrad(*(a.astype(float) for a in (dZ, W, Z)), "softsign")
    np.testing.assert_allclose(widen(dZ_prev), exact, rtol=2**-7, atol=1e-6)


def replayed() -> None:
    """A captured product, its batch in runs: the turns begin anew."""
    dZ, X = whole((200, 64), (200, 72))
    given = round_to(dZ, "bf16"), round_to(X, "bf16")
    with hopper.on_hopper(hopper.SHARED):
        dW = np.full((64, 72), np.nan, F32)
        program = mixed("bf16").capture(
            lambda dZ, X: mixed("bf16").linear_wgrad(dZ, X, out=dW), *given
        )
        for _ in range(2):
            dW[...] = np.nan
            program(*given)
            np.testing.assert_array_equal(dW, dZ.T @ X)


HEADER = partial(Mutant, "hopper_product.cuh")
ONE = partial(Mutant, "one_tile.cuh")
HOPPER = [
    HEADER("if (first) wait_turn(turn, work.run());", "", in_runs),
    HEADER("there + sums.at[p][i];", "sums.at[p][i];", in_runs),
    HEADER("ring.parity() ^ 1)", "ring.parity())", shared),
    HEADER("barrier_wait(ring.free(), ring.parity() ^ 1);", "", shared),
    HEADER("barrier_wait(ring.full(), ring.parity());", "", shared),
    HEADER("STRIP_BYTES = (M + N) * 128", "STRIP_BYTES = (M + N) * 64", shared),
    HEADER("4 * Tile::SHARERS * Tile::CLUSTER", "4 * Tile::CLUSTER", shared),
    HEADER("4 * Tile::SHARERS * Tile::CLUSTER", "4 * Tile::SHARERS", in_clusters),
    HEADER("wgmma_wait<1>();", "", shared),
    HEADER("if (i > 0) Ring{ring.strip - 1, ring.base}.release();",
           "Ring{ring.strip, ring.base}.release();", shared),
    HEADER("i > 0 || step > 0", "1", shared),
    HEADER("box + step * 2048", "box + step * 1024", shared),
    HEADER("box + step * STEP_BYTES", "box + step * 16", shared),
    HEADER("described<A_BY_K>(ring.A()", "described<B_BY_K>(ring.A()", shared),
    HEADER("A_BY_K ? m : k, A_BY_K ? k : m", "k, m", shared),
    HEADER("x = B_BY_K ? n : k", "x = B_BY_K ? k : n", shared),
    HEADER("(first_box + p) * BOX_BYTES", "p * BOX_BYTES", shared),
    HEADER("box % Tile::CLUSTER == int(cluster_rank())", "box % Tile::CLUSTER == 0", in_clusters),
    HEADER("barrier_arrive_remote(in_cluster(free(), block))", "barrier_arrive(free())",
           in_clusters),
    HEADER("first.m += blockIdx.x % Tile::CLUSTER * Tile::M;", "", in_clusters),
    HEADER("cluster_sync();  // others", "__syncwarp();  // others", in_clusters),
    HEADER("if (Tile::PING_PONG) barrier_wait(", "if (false) barrier_wait(", in_turn),
    HEADER("(number / 2 & 1) ^ (group == 1)", "(number / 2 & 1)", in_turn),
    HEADER("barrier_arrive(ring.turn(3 - group))", "barrier_arrive(ring.turn(group))", in_turn),
    HEADER("ring.strip += work.strips();", "", in_turn),
    HEADER("if (p != piece || j / 4 != block)", "if (j / 4 != block)", tall),
    HEADER("at.m += part * Tile::ROWS;", "", shared),
    HEADER("if (at.m < M) finish(at, sums);", "finish(at, sums);", in_clusters),
    HEADER("if (work.run() > 0) sums", "sums", in_runs),
    HEADER("last ? 0 : work.run() + 1", "work.run() + 1", replayed),
    HEADER("lane % 2 * 4 + lane % 8 / 2", "lane % 8", shared),
    HEADER("matrix / 2 * 8 + lane % 8", "matrix % 2 * 8 + lane % 8", shared),
    HEADER("if (thread == 0) store_box_wait_read<OUTS - 1>();", "", shared),
    HEADER("group_sync(group);\n                decltype", "decltype", shared),
    HEADER("fence_shared_async();\n                group_sync(group);", "", shared),
    HEADER("(turn + 1) % OUTS", "turn", shared),
    HEADER("if (m + row >= M) break;", "", bits),
    HEADER("min(m + warp * EACH + i, M - 1)", "m + warp * EACH + i", derivatives),
    HEADER("s_totals[lane * STRIDE + warp] = total;\n            group_sync(group);",
           "s_totals[lane * STRIDE + warp] = total;", shared),
    HEADER("i = 1; i < GROUP / 32", "i = 2; i < GROUP / 32", shared),
    HEADER("if (threadIdx.x % GROUP == 0) store_box_wait_read<0>();", "", shared),
    HEADER("n = at.n + block * OUT_COLUMNS + lane", "n = at.n + block * OUT_COLUMNS", bits),
    HEADER("A_DOWN_K && !ALONG_K", "A_DOWN_K", tf32),
    HEADER("B_DOWN_K && !ALONG_K", "B_DOWN_K", tf32),
    HEADER("STRIP_K = 128 / sizeof(stored)", "STRIP_K = 64", tf32),
    HEADER("sizeof(T)) / (TWICE ? 2 : 1)", "sizeof(T))", written_twice),
    HEADER("turned = own + OUT * sizeof(T)", "turned = own", written_twice),
    HEADER("turned + lane * 128, warp", "turned + lane * 64, warp", written_twice),
    HEADER("first / 4 ^ lane % 8", "first / 4", written_twice),
    HEADER("column[(first + k) * OUT_COLUMNS]", "column[first + k]", written_twice),
    HEADER("first = warp * EACH + i;", "first = i;", written_twice),
    HEADER("shared_address(turned), int(m), int(n)", "shared_address(turned), int(n), int(m)",
           written_twice),
    *(Mutant("transpose.cu", old, new, transposes) for old, new in (
        ("    __syncthreads();\n", ""),
        ("if (row + i < rows && column", "if (column"),
        ("&& column + lane < columns", ""),
        ("if (column + i < columns && row", "if (row"),
        ("&& row + lane < rows", ""),
        ("(column + i) * pitch", "(column + i) * rows"),
        ("s_tile[lane][i]", "s_tile[i][lane]"),
        ("blockIdx.x % across * WARP", "blockIdx.x / across * WARP"),
        ("as_float(to_tf32(as_bits(s_tile[lane][i])))", "s_tile[lane][i]"),
    )),
    Mutant("floats.cuh", "value(as_float(to_tf32(as_bits(x))))", "value(x)", written_twice),
    Mutant("floats.cuh", "wgmma_tf32(d, a, b, keep)", "wgmma_tf32(d, b, a, keep)", tf32),
    Mutant("floats.cuh", "wgmma_fp16<A_BY_K", "wgmma_bf16<A_BY_K", halves),
]  # fmt: skip
