"""Bugs for the sources of products on tensor cores, and the checks that must notice them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from backprop_kernels import reference
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import cublaslt, tuning
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.precisions import round_to, widen

from tests.cuda_host.backend import adapter, installed
from tests.cuda_host.fake_cublaslt import fake_cublaslt
from tests.cuda_host.mutants import BARRIER, F32, Mutant, whole


@cache
def mixed(precision: str) -> Any:
    with installed():
        return adapter(installed, InPrecision(precision), "cast")


def rounded(precision: str, name: str, *arrays: Array) -> None:
    """The product of whole numbers in a precision, exact but for the rounding of its result."""
    got = getattr(mixed(precision), name)(*(round_to(a, precision) for a in arrays))
    expected = getattr(reference, name)(*(a.astype(float) for a in arrays))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for computed, true in pairs:
        if computed is not None and true is not None:
            exact = true.astype(F32)
            if computed.dtype != F32:
                computed, exact = widen(computed), widen(round_to(exact, precision))
            np.testing.assert_array_equal(computed, exact)


def tensor_products(precision: str = "bf16") -> None:
    """Rows on 16 bytes and rows that are not; fewer strips than stages, and more."""
    for batch, in_features, out_features in ((70, 40, 24), (45, 37, 13), (200, 200, 8)):
        X, W, dZ = whole(
            (batch, in_features), (out_features, in_features), (batch, out_features)
        )  # fmt: skip
        rounded(precision, "linear_forward", X, W)
        rounded(precision, "linear_wgrad", dZ, X)
        rounded(precision, "linear_dgrad", np.sign(dZ), np.sign(W))


def tf32_products() -> None:
    tensor_products("tf32")


def given_products() -> None:
    """Sums that a library made; several tiles down and across."""
    with installed(), fake_cublaslt(), tuning.deciding(lambda found: found[-1]):
        X, W = whole((72, 8), (264, 8))
        rounded("bf16", "linear_forward", X, W)
        rounded("bf16", "linear_dgrad", np.sign(X @ W.T), np.sign(W[:, :8]))
        assert len(cublaslt.library().calls) == 2


def norms() -> None:
    """In 16 bits, under a loss scale."""
    rng = np.random.default_rng(0)
    X, dZ = (round_to(rng.standard_normal((70, 35)).astype(F32), "fp16") for _ in range(2))
    gamma, scale = rng.standard_normal(35).astype(F32), 8.0
    mean, rstd = X.astype(F32).mean(axis=0), 1 / X.astype(F32).std(axis=0)
    fp16 = mixed("fp16")
    try:
        with installed():
            fp16.module.set_loss_scale(scale)
        got = fp16.batch_norm_backward(dZ * np.float16(scale), X, gamma, mean, rstd)
    finally:
        with installed():
            fp16.module.set_loss_scale(1.0)
    wide = [a.astype(float) for a in (dZ, X, gamma, mean, rstd)]
    dZ_prev, db_prev, dgamma = reference.batch_norm_backward(*wide)
    np.testing.assert_allclose(got[0] / scale, dZ_prev, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(got[1], db_prev, rtol=2e-3, atol=2e-2)
    np.testing.assert_allclose(got[2], dgamma, rtol=1e-4, atol=1e-4)


def planes() -> None:
    """Whole numbers of 24 bits by small ones, their sums within float32's bound."""
    for precision, digits in (("bf16x6", 24), ("bf16x3", 16)):
        rng = np.random.default_rng(1)
        for batch, inside, outside in ((70, 40, 24), (45, 37, 13)):
            X, W, dZ = (
                rng.integers(-(2**24), 2**24, shape).astype(F32)
                for shape in ((batch, inside), (outside, inside), (batch, outside))
            )
            got = [
                mixed(precision).linear_forward(X, W)[0], mixed(precision).linear_wgrad(dZ, X),
                mixed(precision).linear_dgrad(dZ, W)[0],
            ]  # fmt: skip
            for C, (A, B) in zip(got, ((X, W.T), (dZ.T, X), (dZ, W)), strict=True):
                true, size = A.astype(float) @ B, np.abs(A).astype(float) @ np.abs(B)
                assert (np.abs(C - true) <= 4 * 2.0**-digits * size).all()


def largest_numbers() -> None:
    """Their first plane must not be infinite."""
    X = np.array([[np.finfo(F32).max, 0.0]], F32)
    Y, _ = mixed("bf16x6").linear_forward(X, np.eye(2, dtype=F32))
    np.testing.assert_array_equal(Y, X)


def fp16_numbers() -> None:
    """Above a half the last place is rounded up, of operands and of what is stored."""
    X = np.array([[1 + 2.0**-11 + 2.0**-20, 3.0]], F32)
    expected = np.array([[1 + 2.0**-10, 3.0]], F32)
    Y, _ = mixed("tf32").linear_forward(X, np.eye(2, dtype=F32))
    np.testing.assert_array_equal(Y, expected)
    for precision in ("fp16", "bf16"):
        out = np.empty((1, 2), round_to(X, precision).dtype)
        mixed(precision).cast(X, out)
        np.testing.assert_array_equal(out, round_to(X, precision))
        unit = round_to(np.eye(2, dtype=F32), precision)
        Y, _ = mixed(precision).linear_forward(out, unit)
        np.testing.assert_array_equal(Y, out)


def loss_scale() -> None:
    dZ, X, W = (round_to(a, "fp16") for a in whole((70, 5), (70, 7), (5, 7)))
    fp16 = mixed("fp16")
    for scale in (8.0, 1.0):
        with installed():
            fp16.module.set_loss_scale(scale)
        scaled = dZ * np.float16(scale)
        np.testing.assert_array_equal(fp16.linear_wgrad(scaled, X), dZ.T.astype(F32) @ X)
        _, db = fp16.linear_dgrad(scaled, W)
        np.testing.assert_array_equal(db, (dZ.astype(F32) @ W).sum(axis=0))
        out = np.empty((64, 5), np.float16)  # up to the guard page
        fp16.cast(dZ[:64].astype(F32), out, np.array(scale, F32))
        np.testing.assert_array_equal(out, scaled[:64])


TENSOR_CORES = [
    Mutant("column_sums.cu", "factor ? sum * *factor : sum", "sum", norms),
    Mutant("column_sums.cu", "factor ? sum * *factor : sum", "factor ? *factor : sum", norms),
    Mutant("batch_norm.cu", "dZ_prev[e] = stored(g);", "dZ_prev[e] = stored(2 * g);", norms),
    *(Mutant("given_product.cuh", old, new, given_products) for old, new in (
        ("corner.n + threadIdx.x % Tile::N", "threadIdx.x % Tile::N"),
        ("min(corner.m + Tile::M, M)", "corner.m + Tile::M"),
        ("min(corner.m + Tile::M, M)", "min(corner.m + Tile::M - 1, M)"),
        ("corner.m + threadIdx.x / Tile::N;", "corner.m;"),
        ("n < N ? sums.at[m * N + n] : real(0)", "sums.at[m * N + n]"),
        ("sums.at[m * N + n]", "sums.at[m + n * M]"),
    )),
    Mutant("linear_dgrad.cu", "unscale ? total * *unscale : total", "total",
           loss_scale),
    Mutant("linear_wgrad.cu", "unscale ? *unscale : real(1)", "real(1)", loss_scale),
    Mutant("cast.cu", "values[i] * by", "values[i] / by", loss_scale),
    Mutant("cast.cu", "i < size;", "i <= size;", loss_scale),
    Mutant("floats.cuh", "bits(to_fp16(x))", "bits(to_bf16(x))", fp16_numbers),
    Mutant("floats.cuh", "to_tf32(from[0][i])", "from[0][i]", fp16_numbers),
    Mutant("floats.cuh", "mma_fp16(d, a, b)", "mma_bf16(d, a, b)", fp16_numbers),
    *(Mutant("floats.cuh", old, new, check) for old, new, check in (
        ("low -= from_bf16(planes[p][i] & 0xffff)", "low = 0.0f", planes),
        ("high -= from_bf16(planes[p][i] >> 16)", "high += from_bf16(planes[p][i] >> 16)", planes),
        ("low -= from_bf16(planes[p][i] & 0xffff)", "low -= from_bf16(planes[p][i] >> 16)", planes),
        ("OF_B ? i % 2 : i / 2", "i / 2", planes),
        ("OF_B ? i / 2 * 2 : i % 2", "i % 2", planes),
        ("OF_B ? 1 : 2)", "1)", planes),
        ("p + 1 < COUNT ? to_finite_bf16_pair(low, high) : to_bf16_pair(low, high)",
         "to_bf16_pair(low, high)", largest_numbers),
    )),
    *(Mutant("tensor_product.cuh", old, new, planes) for old, new in (
        ("order = operand::PLANES - 1; order >= 0", "order = 0; order >= 0"),
        ("int p = 0; p <= order", "int p = 1; p <= order"),
        ("int p = 0; p <= order", "int p = 0; p < order + (order == 0)"),
        ("b[order - p][2 * half + 1]}", "b[p][2 * half + 1]}"),
        ("multiply_add(sum, a[i][p], side)", "multiply_add(sum, a[i][0], side)"),
        ("[e] += parts[i][e]", "[e] = parts[i][e]"),
        ("step * operand::FRAGMENTS + p", "step + p * 0"),
    )),
    *(Mutant("tensor_product.cuh", old, new, check) for old, new, check in (
        ("copy_async_wait<Tile::STAGES - 2>", "copy_async_wait<Tile::STAGES - 1>",
         tensor_products),
        (BARRIER + "  // this strip is there for all, and all have done with the one before", "",
         tensor_products),
        ("k + (Tile::STAGES - 1) * STRIP_K", "k + Tile::STAGES * STRIP_K", tensor_products),
        ("copy_async_commit();  // also", "if (k < k_end) copy_async_commit();  // also",
         tensor_products),
        ("right < CHUNK ? int(max(right, 0ll)) : CHUNK", "right > 0 ? CHUNK : 0", tensor_products),
        ("e * EVERY < below ? wide", "e * EVERY <= below ? wide", tensor_products),
        ("e * EVERY < below && j < wide", "j < wide", tensor_products),
        ("e * EVERY < below && j < wide", "e * EVERY < below", tensor_products),
        ("sizeof(stored)) % 16 == 0", "sizeof(stored)) % 2 == 0", tensor_products),
        ("lower(matrix) * 8 + lane % 8", "lower(matrix) * 8 + lane % 4", tensor_products),
        ("part * 2 + later(matrix)", "later(matrix)", tensor_products),
        ("part * 16 + later(matrix) * 8", "part * 16 + lower(matrix) * 8", tensor_products),
        ("first / 8 + lower(matrix)", "first / 8", tensor_products),
        ("OF_B ? matrix / 2 : matrix % 2", "matrix % 2", tensor_products),
        ("OF_B ? matrix % 2 : matrix / 2", "matrix % 2", tensor_products),
        ("{b[order - p][2 * half],", "{b[order - p][half],", tensor_products),
        ("later(i) * 4 + lane % 4", "lower(i) * 4 + lane % 4", tf32_products),
        ("m % 4 * 4", "m % 2 * 4", tf32_products),
        ("now = now + 1 == Tile::STAGES ? 0 : now + 1", "now ^= 1", tensor_products),
        ("next + 1 == Tile::STAGES ? 0 : next + 1", "next ^ 1", tensor_products),
        ("stage < Tile::STAGES - 1; ++stage", "stage < Tile::STAGES - 2; ++stage",
         tensor_products),
        (BARRIER + "  // the strips, or the rows before, have been read", "", tensor_products),
        ("}\n        " + BARRIER + "\n#pragma unroll 1", "}\n#pragma unroll 1", tensor_products),
        ("lane / 4 + e / 2 * 8", "lane / 4 + e / 2 * 4", tensor_products),
        ("(row / 16 * Tile::ROWS + i) * 16", "(row / 16 + i) * 16", tensor_products),
        ("if (m < M) element", "element", tensor_products),
    )),
]  # fmt: skip
