"""Bugs for the C++ bodies of the PTX wrappers, and the tests of test_ptx.py that must notice them.

A body that reads an instruction otherwise than the hardware does would let the emulator prove
kernels that are wrong: so each is held to what NumPy says, and what is not held shows here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.cuda_host.backend import installed
from tests.cuda_host.mutants import Mutant
from tests.kernels import test_ptx


def _noticed_by(test: Callable[..., None], **given: Any) -> Callable[[], None]:
    def check() -> None:
        with installed():
            import cupy

            test(cupy, **given)

    check.__name__ = test.__name__
    return check


brain = _noticed_by(test_ptx.test_rounding_to_bf16)
pairs = _noticed_by(test_ptx.test_rounding_in_pairs)
conversions = _noticed_by(test_ptx.test_rounding_to_fp16_and_tf32)
products = _noticed_by(test_ptx.test_a_rounded_product_is_not_part_of_a_sum)
largest = _noticed_by(test_ptx.test_a_cell_is_raised_to_the_largest)
copies = _noticed_by(test_ptx.test_asynchronous_copies)
loads = _noticed_by(test_ptx.test_matrices_from_shared_memory)
stores = _noticed_by(test_ptx.test_matrices_to_shared_memory)
brain_product = _noticed_by(test_ptx.test_warp_product_of_16_bit_floats, kind="bf16")
half_product = _noticed_by(test_ptx.test_warp_product_of_16_bit_floats, kind="fp16")
tf32_product = _noticed_by(test_ptx.test_warp_product_of_tf32)
box = _noticed_by(test_ptx.test_box_lies_swizzled_and_zero_outside, x=64, y=8)
unbox = _noticed_by(test_ptx.test_box_is_written_where_it_lies_inside, x=64, y=8)
cluster = _noticed_by(test_ptx.test_blocks_of_a_cluster_share_what_one_fetches)
turns = _noticed_by(test_ptx.test_blocks_take_turns)


def group(kind: str, columns: int, a_by_k: int, b_by_k: int) -> Callable[[], None]:
    return _noticed_by(
        test_ptx.test_warpgroup_product_behind_a_ring_of_boxes,
        kind=kind, columns=columns, a_by_k=a_by_k, b_by_k=b_by_k, depth=200,
    )  # fmt: skip


small, crossed, halves = group("bf16", 64, 0, 0), group("bf16", 128, 0, 1), group("fp16", 64, 0, 0)
cut = group("tf32", 64, 0, 0)

bug = partial(Mutant, "ptx.cuh")
PTX = [
    bug("+ host::lane() / 4] + host::lane() % 4 * 4) = r[i]",
        "+ host::lane() / 4] + host::lane() % 4 * 2) = r[i]", stores),
    bug("host::load_box_later(to, map, barrier, x, y, __LINE__)",
        "host::load_box_later(to, map, barrier, y, x, __LINE__)", box),
    bug("+ host::lane() / 4] + host::lane() % 4 * 4) = r[i]",
        "+ host::lane() % 8] + host::lane() % 4 * 4) = r[i]", stores),
    bug("(r[i] >> 16 * h)", "(r[i] >> 16 * (1 - h))", stores),
    bug("% 4 * 2 + h])[column] =", "% 4 * 2 + h])[column ^ 1] =", stores),
    bug("% 4 * 2 + h])[column] =", "% 4 + h])[column] =", stores),
    bug("store_box_later(map, from, x, y", "store_box_later(map, from, y, x", unbox),
    bug("store_box_later(map, from, x, y", "store_box_later(map, from, x, y + 1", unbox),
    bug("host::commit_stores();", "", unbox),
    bug("wait_stores(PENDING, false)", "wait_stores(PENDING + 1, false)", unbox),
    bug("wait_stores(PENDING, true)", "wait_stores(PENDING, false)", unbox),
    bug("return host::cluster_rank()", "return 0", cluster),
    bug("host::wait(host::AT_CLUSTER_BARRIER, __LINE__)",
        "host::wait(host::AT_BLOCK_BARRIER, __LINE__)", cluster),
    bug("return host::in_cluster(address, rank, __LINE__)", "return address", cluster),
    bug("host::barrier_arrive_remote(barrier, __LINE__)", "", cluster),
    bug("if (blocks >> rank & 1)\n", "if (rank == host::cluster_rank())\n", cluster),
    bug("host::in_cluster(barrier, rank, __LINE__), x", "barrier, x", cluster),
    bug("host::load_box_later(host::in_cluster(to, rank, __LINE__)", "host::load_box_later(to",
        cluster),
    bug("__LINE__), x, y, __LINE__)", "__LINE__), x, 0, __LINE__)", cluster),
    bug("u32 rank = 0; blocks >> rank", "u32 rank = 1; blocks >> rank", cluster),
    bug("barrier_init(barrier, arrivals", "barrier_init(barrier, arrivals + 1", box),
    bug("barrier_arrive(barrier, bytes", "barrier_arrive(barrier, bytes / 2", box),
    bug("barrier_arrive(barrier, 0", "barrier_arrive(barrier, 128", small),
    bug("barrier_passed(barrier, parity)", "barrier_passed(barrier, parity ^ 1)", box),
    bug("while (!host::barrier_passed", "if (!host::barrier_passed", small),
    bug("product_later(d, N, a, b, A_BY_K", "product_later(d, N, b, a, A_BY_K", small),
    bug("a, b, A_BY_K, B_BY_K, VALUE, keep)", "a, b, B_BY_K, A_BY_K, VALUE, keep)", crossed),
    bug("A_BY_K, B_BY_K, VALUE, keep)", "A_BY_K, B_BY_K, VALUE, 1)", small),
    bug('"f16", host::from_fp16)', '"f16", host::from_bf16)', halves),
    bug("host::from_tf32, keep, 4)", "host::from_bits, keep, 4)", cut),
    bug("host::from_tf32, keep, 4)", "host::from_tf32, keep, 2)", cut),
    bug("__atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine", "false", turns),
    bug("__atomic_store_n(turn, next, ", "__atomic_store_n(turn, next + 1, ", turns),
    bug("host::commit_products(__LINE__)", "", small),
    bug("wait_products(PENDING", "wait_products(PENDING + 1", small),
    bug("host::copy_later(to, from, 16, valid", "host::copy_later(to, from, 16, 16", copies),
    bug("host::copy_later(to, from, 4, valid", "host::copy_later(to, from, 4, 4", copies),
    bug("host::commit_copies();", "", copies),
    bug("host::wait_copies(PENDING)", "host::wait_copies(PENDING + 1)", copies),
    bug("r[i] = *reinterpret_cast<const u32*>(rows[i * 8 + host::lane() / 4]",
        "r[i] = *reinterpret_cast<const u32*>(rows[i * 8 + host::lane() % 8]", loads),
    bug("halves[0] | halves[1] << 16", "halves[1] | halves[0] << 16", loads),
    bug("__fmul_rn(a, b);\n#else\n    return host::rounded(a * b)",
        "__fmul_rn(a, b);\n#else\n    return a * b", products),
    bug("__dmul_rn(a, b);\n#else\n    return host::rounded(a * b)",
        "__dmul_rn(a, b);\n#else\n    return a * b", products),
    bug("(__atomic_load_n(cell, __ATOMIC_RELAXED) < value)", "(false)", largest),
    bug("__ATOMIC_RELAXED) < value) atomicMax(cell, value)",
        "__ATOMIC_RELAXED) < value) *cell = value / 2", largest),
    bug("return host::to_bf16(x)", "return host::to_bf16(-x)", brain),
    bug("return to_bf16(low) | u32(to_bf16(high)) << 16",
        "return to_bf16(high) | u32(to_bf16(low)) << 16", pairs),
    bug("host::to_finite_bf16(low) |", "to_bf16(low) |", pairs),
    bug("return host::to_fp16(x)", "return host::to_bf16(x)", conversions),
    bug("return host::from_fp16(bits)", "return host::from_bf16(bits)", conversions),
    bug("return host::from_bf16(bits)", "return host::from_fp16(bits)", conversions),
    bug("return host::to_tf32(x)", "return x", conversions),
    bug("mma16(d, a, b, host::from_bf16", "mma16(d, a, b, host::from_fp16", brain_product),
    bug("mma16(d, a, b, host::from_fp16", "mma16(d, a, b, host::from_bf16", half_product),
    bug("host::mma_tf32(d, a, b, __LINE__)", "host::mma_tf32(d, a, a, __LINE__)", tf32_product),
]  # fmt: skip
