from __future__ import annotations

from itertools import product
from types import ModuleType

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array

from tests import oracles
from tests import saved as kept
from tests.guarded import Guards
from tests.inputs import LONG_SIZES, OPERANDS, SIZES, exact_dtype, integers, operands, shapes
from tests.tolerances import assert_within, derivative_bound, sum_bound

# What act' is for a saved whole number, where that is a whole number too.
EXACT = {
    "identity": lambda Y: np.ones_like(Y),
    "relu": lambda Y: Y > 0,
    "relu6": lambda Y: (Y > 0) & (Y < 6),
    "hardtanh": lambda Y: (Y > -1) & (Y < 1),
}


def dgrad(
    backend: ModuleType, dZ: Array, W: Array, saved: Array | None = None,
    activation: str = "identity", phase: int = 0,
) -> tuple[Array, Array]:  # fmt: skip
    """The operator on guarded arrays; `saved` is the Y or Z of the table."""
    guards = Guards(phase)
    shape = (len(dZ), W.shape[1])
    out = guards.output(shape, dZ.dtype), guards.output(shape[1:], dZ.dtype)
    got = backend.linear_dgrad(
        *map(guards.input, (dZ, W, kept.as_kept(backend, activation, saved))),
        activation, None, out=out,
    )  # fmt: skip
    guards.check()
    assert got[0] is out[0] and got[1] is out[1]
    return out


def check_integers(backend: ModuleType, dtype: np.dtype, sizes: tuple[int, ...], low: int) -> None:
    rng = np.random.default_rng(0)
    names = list(EXACT)
    for number, (batch, in_features, out_features) in enumerate(shapes(sizes, backend)):
        dZ = integers(rng, (batch, out_features), dtype, low)
        W = integers(rng, (out_features, in_features), dtype, low)
        saved = integers(rng, (batch, in_features), dtype, low)
        # Only the last few rows count, so that the column sums stay exact in float32.
        dZ[: -max(1, 2**24 // (64 * max(out_features, 1)) // 2)] = 0
        activation = names[number % 4]
        dZ_prev, db_prev = dgrad(
            backend, dZ, W, saved if activation != "identity" else None, activation, number % 2
        )
        product = dZ.astype(np.float64) @ W.astype(np.float64)
        exact = product * EXACT[activation](saved)
        assert np.abs(exact).sum(axis=0).max(initial=0) < 2**24
        assert np.array_equal(dZ_prev, exact), (batch, in_features, out_features, activation)
        assert np.array_equal(db_prev, exact.sum(axis=0)), (batch, in_features, out_features)


@pytest.mark.parametrize("low", [-8, 0], ids=["signed", "non-negative"])
def test_whole_numbers_are_exact(backend: ModuleType, dtype: np.dtype, low: int) -> None:
    check_integers(backend, dtype, SIZES, low)


@pytest.mark.long
@pytest.mark.parametrize("low", [-8, 0], ids=["signed", "non-negative"])
def test_whole_numbers_are_exact_in_large_shapes(
    backend: ModuleType, dtype: np.dtype, low: int
) -> None:
    check_integers(backend, dtype, LONG_SIZES, low)


@pytest.mark.parametrize("kind", OPERANDS)
def test_product_is_within_its_bound(backend: ModuleType, dtype: np.dtype, kind: str) -> None:
    for batch, in_features, out_features in product((1, 7, 129), (1, 16, 49), (1, 2, 17, 64, 257)):
        dZ, Wt = operands(kind, batch, in_features, out_features, dtype)
        W = np.ascontiguousarray(Wt.T)
        dZ_prev, db_prev = dgrad(backend, dZ, W)
        wide = exact_dtype(dtype)
        exact = dZ.astype(wide) @ W.astype(wide)
        magnitude = np.abs(dZ).astype(wide) @ np.abs(W).astype(wide)
        what = f"{kind} ({batch}, {in_features}) ← {out_features}"
        systematic = kind == "constant"
        assert_within(
            dZ_prev, exact, sum_bound(out_features, magnitude, exact, dtype, systematic), what
        )
        # db is the sum of dZ_prev as it was stored: no error of the product enters.
        stored = dZ_prev.astype(wide)
        total, sizes = stored.sum(axis=0), np.abs(stored).sum(axis=0)
        bound = sum_bound(batch, sizes, total, dtype, systematic)
        assert_within(db_prev, total, bound, f"db of {what}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_is_within_its_bound(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    act, slope = oracles.ACTIVATIONS[activation]
    for batch, in_features, out_features in ((1, 1, 1), (9, 33, 7), (65, 17, 48)):
        dZ, Wt = operands("normal", batch, in_features, out_features, dtype)
        W = np.ascontiguousarray(Wt.T)
        rng = np.random.default_rng(1)
        Z = (3 * rng.standard_normal((batch, in_features))).astype(dtype).astype(np.float64)
        saved = {"Y": act(Z), "Z": Z, "": None}[ACTIVATIONS[activation].saves]
        saved = None if saved is None else saved.astype(dtype)
        dZ_prev, db_prev = dgrad(backend, dZ, W, saved, activation)
        gradient = dZ.astype(np.float64) @ W.astype(np.float64)
        magnitude = np.abs(dZ).astype(np.float64) @ np.abs(W).astype(np.float64)
        error = 2 * sum_bound(out_features, magnitude, gradient, dtype)
        exact = gradient * slope(Z)
        assert_within(
            dZ_prev, exact, derivative_bound(gradient, error, Z, slope(Z), dtype), activation
        )
        stored = dZ_prev.astype(np.float64)
        total, sizes = stored.sum(axis=0), np.abs(stored).sum(axis=0)
        assert_within(db_prev, total, 2 * sum_bound(batch, sizes, total, dtype), f"db {activation}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_in_the_far_tails_is_finite(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    act, slope = oracles.ACTIVATIONS[activation]
    Z = np.array([[-1e15], [-700], [-80], [-1e-30], [0], [1e-30], [80], [700], [1e15]], dtype)
    with np.errstate(over="ignore", under="ignore"):
        Y = act(Z.astype(np.float64)).astype(dtype)
        exact = slope(Z.astype(np.float64)).astype(dtype)
    saved = {"Y": Y, "Z": Z, "": None}[ACTIVATIONS[activation].saves]
    one = np.ones((1, 1), dtype)
    dZ_prev, _ = dgrad(backend, np.ones_like(Z), one, saved, activation)
    if activation == "sin":  # no two libraries agree on the cosine of 1e15 radians in float32
        dZ_prev, exact = dZ_prev[1:-1], exact[1:-1]
    limits = np.finfo(dtype)
    # 1 − y² near |y| = 1 is good to u absolutely, not relatively.
    np.testing.assert_allclose(dZ_prev, exact, rtol=64 * limits.eps, atol=2 * limits.eps)


@pytest.mark.parametrize(
    ("activation", "kinks", "slopes"),
    [
        ("relu", [0.0, -0.0], [0, 0]),
        ("leaky_relu", [0.0, -0.0], [0.01, 0.01]),
        ("relu6", [0.0, 6.0], [0, 0]),
        ("hardtanh", [-1.0, 1.0], [0, 0]),
        ("hardsigmoid", [-3.0, 3.0], [0, 0]),
        ("hardswish", [-3.0, 3.0], [0, 1]),
        ("elu", [0.0, -0.0], [1, 1]),
    ],
)
def test_derivative_at_a_kink_is_pytorchs_choice(
    backend: ModuleType, dtype: np.dtype, activation: str, kinks: list[float], slopes: list[float]
) -> None:
    saved = np.array([kinks], dtype)
    W = np.ones((1, 2), dtype)
    dZ_prev, _ = dgrad(backend, np.ones((1, 1), dtype), W, saved, activation)
    assert np.array_equal(dZ_prev, np.array([slopes], dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_its_row_and_the_bias_only(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    dZ, W = operands("normal", 19, 23, 37, dtype)[0], np.ones((37, 23), dtype)
    saved = np.full((19, 23), 0.5, dtype)
    clean, _ = dgrad(backend, dZ, W, saved, activation)
    dZ[11, 5] = np.nan
    dZ_prev, db_prev = dgrad(backend, dZ, W, saved, activation)
    assert np.isnan(dZ_prev[11]).all() and np.isnan(db_prev).all()
    assert np.array_equal(np.delete(dZ_prev, 11, axis=0), np.delete(clean, 11, axis=0))


def test_layer_below_may_want_no_bias_gradient(backend: ModuleType, dtype: np.dtype) -> None:
    dZ, W = operands("normal", 9, 5, 5, dtype)
    expected, _ = dgrad(backend, dZ, W)
    guards = Guards()
    dZ_prev = guards.output((9, 5), dtype)
    backend.linear_dgrad(dZ, W, None, "identity", None, out=(dZ_prev, None))
    guards.check()
    assert np.array_equal(dZ_prev, expected)
