"""Every instruction of include/ptx.cuh against NumPy: its C++ body here, its PTX body on a GPU.

Where both sides pass, the emulator reads these instructions as the hardware does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.launch import launch
from backprop_kernels.cuda.tensor_map import tensor_map

from tests.cuda_host import build
from tests.cuda_host.backend import installed
from tests.cuda_host.machine_code import NEEDS_NVRTC, instructions
from tests.gpu import GPU

UNITS = Unit(str(Path(__file__).parent / "ptx_units.cu"), "")
RNG = np.random.default_rng(0)


@pytest.fixture(params=["emulator", *GPU])
def cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy, or what stands in for it."""
    if request.param == "gpu":
        import cupy

        yield cupy
        return
    if reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    with installed():
        import cupy

        yield cupy


def run(cupy: Any, entry: str, *arguments: Any, threads: int = 32, shared: int = 0) -> list[Array]:
    """Launch; the arrays among the arguments, as NumPy arrays, after it."""
    placed = [
        cupy.asarray(a) if isinstance(a, np.ndarray) and a.dtype.kind != "V" else a
        for a in arguments
    ]
    launch(UNITS, entry, (1,), (threads,), *placed, shared=shared)
    return [a.get() for a in placed if isinstance(a, cupy.ndarray)]


def bf16(values: Any) -> Array:
    """Whole numbers as bfloat16 bits; all below 256 are exact."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def whole(*shape: int) -> Array:
    return RNG.integers(-8, 9, shape).astype(np.float32)


def test_rounding_to_bf16(cupy: Any) -> None:
    bits = RNG.integers(0, 2**32, 4096, np.uint64).astype(np.uint32)
    special = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x80000000, 1]
    x = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    _, y = run(cupy, "round_to_bf16", x, np.zeros(len(x), np.uint16), len(x))
    back = (y.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.isnan(back), np.isnan(x))
    kept = x.view(np.uint32).astype(np.uint64)
    nearest = (kept + 0x7FFF + (kept >> 16 & 1)) >> 16
    assert np.array_equal(y[~np.isnan(x)], nearest[~np.isnan(x)])


def test_rounding_in_pairs(cupy: Any) -> None:
    """The same numbers as one by one; or finite ones, where those would be infinite."""
    bits = RNG.integers(0, 2**32, 4096, np.uint64).astype(np.uint32)
    special = [0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x80000000, 1, 0]
    x = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    _, single = run(cupy, "round_to_bf16", x, np.zeros(len(x), np.uint16), len(x))
    empty = np.zeros(len(x) // 2, np.uint32)
    _, pairs, finite = run(cupy, "pairs_of_bf16", x, empty, empty.copy(), len(empty))
    number = ~np.isnan(x)
    assert np.array_equal(pairs.view(np.uint16)[number], single[number])
    most = np.where(single & 0x7FFF == 0x7F80, single - 1, single)
    assert np.array_equal(finite.view(np.uint16)[number], most[number])
    for got in (pairs, finite):
        assert (got.view(np.uint16)[~number] & 0x7FFF > 0x7F80).all()


def test_rounding_to_fp16_and_tf32(cupy: Any) -> None:
    bits = RNG.integers(0, 2**32, 4096, np.uint64).astype(np.uint32)
    # Halfway between neighbours, below the smallest, at the largest, beyond it.
    special = [0x33000000, 0x33000001, 0x33C00000, 0x387FE000, 0x477FEFFF, 0x477FF000, 0x3F801000,
               0x3F803000, 0xBF801000, 0x7F7FFFFF, 0xFF800000, 0x80000000, 1]  # fmt: skip
    x = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    x = x[~np.isnan(x)]
    empty = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint32)
    back = np.zeros_like(x), np.zeros_like(x)
    _, half, tf32, from_half, from_brain = run(cupy, "conversions", x, *empty, *back, len(x))
    with np.errstate(over="ignore"):
        assert np.array_equal(half, x.astype(np.float16).view(np.uint16))
    away = (x.view(np.uint32).astype(np.uint64) + 0x1000).astype(np.uint32) & ~np.uint32(0x1FFF)
    assert np.array_equal(tf32 & ~np.uint32(0x1FFF), away)
    assert np.array_equal(from_half, half.view(np.float16).astype(np.float32))
    brain = (half.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(from_brain, brain, equal_nan=True)


def test_asynchronous_copies(cupy: Any) -> None:
    data = RNG.integers(1, 255, 512).astype(np.uint8)
    valid = np.arange(32, dtype=np.int32) % 17
    _, _, wide, narrow = run(
        cupy, "copies", data, valid, np.zeros(512, np.uint8), np.zeros(32, np.uint32)
    )
    keep = np.arange(16) < valid[:, None]
    assert np.array_equal(wide.reshape(32, 16), np.where(keep, data.reshape(32, 16), 0))
    assert np.array_equal(narrow, np.where(valid > 0, data.view(np.uint32)[:32], 0))


def test_matrices_from_shared_memory(cupy: Any) -> None:
    data = RNG.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    empty = np.zeros((4, 32), np.uint32)
    _, plain, transposed = run(cupy, "matrices", data, empty, empty.copy())
    for got, expected in ((plain, data), (transposed, data.transpose(0, 2, 1))):
        assert np.array_equal(got, np.ascontiguousarray(expected).view(np.uint32).reshape(4, 32))


def test_matrices_to_shared_memory(cupy: Any) -> None:
    data = RNG.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    registers = data.view(np.uint32).reshape(4, 32)
    _, plain, transposed = run(cupy, "store_matrices", registers, data * 0, data * 0)
    assert np.array_equal(plain, data)
    assert np.array_equal(transposed, data.transpose(0, 2, 1))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_warp_product_of_16_bit_floats(cupy: Any, kind: str) -> None:
    A, B, D = whole(16, 16), whole(8, 16), whole(16, 8)
    bits = bf16 if kind == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
    *_, got = run(cupy, f"product_{kind}", bits(A), bits(B), D)
    assert np.array_equal(got, D + A @ B.T)


def test_float16_values(cupy: Any) -> None:
    """Subnormals and fractions, by a product with the unit matrix."""
    values = np.array([2**-24, 3 * 2**-20, -(2**-14), 65504, 1 / 3, -1e-5, 0.1, 7], np.float16)
    A = np.tile(values, (16, 2))
    B = np.eye(8, 16, dtype=np.float16)
    *_, got = run(
        cupy, "product_fp16", A.view(np.uint16), B.view(np.uint16), np.zeros((16, 8), np.float32)
    )
    assert np.array_equal(got, A[:, :8].astype(np.float32))


def test_warp_product_of_tf32(cupy: Any) -> None:
    A, B, D = whole(16, 8), whole(8, 8), whole(16, 8)
    *_, got = run(cupy, "product_tf32", A.view(np.uint32), B.view(np.uint32), D)
    assert np.array_equal(got, D + A @ B.T)
    low = A.view(np.uint32) | 0x1FFF  # bits that tf32 does not have
    *_, got = run(cupy, "product_tf32", low, B.view(np.uint32), D)
    assert np.array_equal(got, D + (low & ~np.uint32(0x1FFF)).view(np.float32) @ B.T)


def swizzled(box: Array) -> Array:
    """Rows of 64 with the 128-byte swizzle from plain ones, and the other way round."""
    chunk = np.arange(64) // 8 ^ (np.arange(len(box)) % 8)[:, None]  # 16 bytes each
    return np.take_along_axis(box, chunk * 8 + np.arange(64) % 8, axis=1)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (64, 8), (100, 30), (-8, -3)])
def test_box_lies_swizzled_and_zero_outside(cupy: Any, x: int, y: int) -> None:
    rows, data = 24, RNG.integers(1, 2**16, (40, 136)).astype(np.uint16)
    placed = cupy.asarray(data)
    map_ = tensor_map(placed, (rows, 64), swizzled=True)
    (out,) = run(
        cupy, "box", map_, np.zeros((rows, 64), np.uint16), np.int32(x), np.int32(y),
        np.int32(rows), threads=64, shared=rows * 128,
    )  # fmt: skip
    whole_plane = np.zeros((200, 400), np.uint16)
    whole_plane[50:90, 100:236] = data
    expected = whole_plane[50 + y : 50 + y + rows, 100 + x : 100 + x + 64]
    assert np.array_equal(swizzled(out), expected)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (64, 8), (100, 30), (-8, -3)])
def test_box_is_written_where_it_lies_inside(cupy: Any, x: int, y: int) -> None:
    rows, data = 16, RNG.integers(1, 2**16, (2 * 16, 64)).astype(np.uint16)
    placed = cupy.zeros((40, 136), np.uint16)
    inside = placed[max(y, 0), max(x, 0) :]
    _, _, seen = run(
        cupy, "unbox", tensor_map(placed, (rows, 64), swizzled=True), swizzled(data), np.int32(x),
        np.int32(y), np.int32(rows), inside, np.zeros(1, np.uint16), threads=64, shared=rows * 128,
    )  # fmt: skip
    expected = np.zeros((200, 400), np.uint16)
    expected[50 + y : 50 + y + 2 * rows, 100 + x : 100 + x + 64] = data
    assert np.array_equal(placed.get(), expected[50:90, 100:236])
    assert seen[0] == inside.get()[0]


def test_blocks_of_a_cluster_share_what_one_fetches(cupy: Any) -> None:
    rows, blocks = 8, 4
    data = RNG.integers(1, 2**15, (3 * rows, 64)).astype(np.uint16)
    placed = cupy.asarray(data)
    out = cupy.zeros((blocks, 3 * rows, 64), np.uint16)
    shared = 3 * rows * 128 + 16
    launch(
        UNITS, "exchange", (blocks,), (64,), tensor_map(placed, (rows, 64), swizzled=True), out,
        np.int32(rows), shared=shared,
    )  # fmt: skip
    for block, got in enumerate(out.get()):
        assert np.array_equal(swizzled(got - np.uint16(1 - block % 2)), data), block


@pytest.mark.parametrize("depth", [64, 72, 200, 320])
@pytest.mark.parametrize(
    ("kind", "columns", "a_by_k", "b_by_k"),
    [
        *((kind, 128, a, b) for kind in ("bf16", "fp16") for a in (0, 1) for b in (0, 1)),
        ("bf16", 64, 0, 0), ("bf16", 64, 1, 1), ("bf16", 256, 0, 0), ("bf16", 256, 1, 1),
        ("fp16", 64, 0, 0), ("fp16", 256, 0, 0), ("bf16", 192, 1, 1), ("fp16", 192, 1, 1),
        *(("tf32", columns, 0, 0) for columns in (64, 128, 192, 256)),
    ],
)  # fmt: skip
def test_warpgroup_product_behind_a_ring_of_boxes(
    cupy: Any, kind: str, columns: int, a_by_k: int, b_by_k: int, depth: int
) -> None:
    A, B = whole(64, depth), whole(columns, depth)
    if kind == "tf32":  # which cuts 13 bits off
        A = (A.view(np.uint32) | RNG.integers(0, 2**13, A.shape, np.uint32)).view(np.float32)
    stored = {"bf16": bf16, "fp16": np.float16, "tf32": np.float32}[kind]
    ways = ["", "_b_by_k", "_a_by_k", "_by_k"][2 * a_by_k + b_by_k]
    placed = [
        cupy.asarray(np.ascontiguousarray(stored(M).T if by_k else stored(M)))
        for M, by_k in ((A, a_by_k), (B, b_by_k))
    ]
    box = (64, 32 if kind == "tf32" else 64)
    maps = [tensor_map(matrix, box, swizzled=True) for matrix in placed]
    D = np.full((64, columns), np.nan, np.float32)
    (D,) = run(
        cupy, f"group_product_{kind}_{columns}{ways}", *maps, D, np.int32(depth), threads=256,
        shared=2 * (64 + columns) * 128,
    )  # fmt: skip
    cut = (A.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)
    assert np.array_equal(D, cut @ B.T)


def test_a_rounded_product_is_not_part_of_a_sum(cupy: Any) -> None:
    numbers = RNG.standard_normal((3, 4096))
    given = [*numbers.astype(np.float32), np.zeros(4096, np.float32), *numbers, np.zeros(4096)]
    *_, y, _, _, _, z = run(cupy, "products_and_sums", *given, 4096)
    a, b, c = given[:3]
    assert np.array_equal(y, a * b + c)
    assert np.array_equal(z, numbers[0] * numbers[1] + numbers[2])


def test_a_cell_is_raised_to_the_largest(cupy: Any) -> None:
    values = RNG.integers(0, 2**32, 1000, np.uint64).astype(np.uint32)
    for first in (0, 2**32 - 1):
        cell = cupy.asarray(np.array([first], np.uint32))
        launch(UNITS, "raised", (4,), (32,), cupy.asarray(values), cell, len(values))
        assert cell.get()[0] == max(first, values.max())


def test_blocks_take_turns(cupy: Any) -> None:
    turn, order = cupy.zeros(1, np.uint32), cupy.zeros(1, np.int64)
    launch(UNITS, "in_turn", (4,), (32,), turn, order)
    assert (turn.get()[0], order.get()[0]) == (4, 3210)


AMPERE = {"HMMA", "LDSM", "LDGSTS"}
HOPPER = {
    *AMPERE, "STSM", "SYNCS", "UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "UTMACMDFLUSH",
    "FENCE.VIEW.ASYNC.S", "UCGABAR_ARV", "UCGABAR_WAIT", "HGMMA", "HGMMA.64x256x8.F32.TF32",
    "USETMAXREG",
}  # fmt: skip


@NEEDS_NVRTC
@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm_80", AMPERE), ("sm_90a", HOPPER), ("sm_120", {*AMPERE, "STSM"})],
)
def test_wrappers_become_the_instructions_they_name(arch: str, expected: set[str]) -> None:
    found = instructions(nvrtc.compile_unit(UNITS, arch, nvrtc.STRICT).cubin)
    codes = {code for kernel in found.values() for code in kernel}
    kinds = {code.partition(".")[0] for code in codes}
    assert expected <= codes | kinds, expected - codes - kinds
