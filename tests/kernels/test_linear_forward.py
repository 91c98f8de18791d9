from __future__ import annotations

from itertools import product
from types import ModuleType

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, Dropout

from tests import oracles
from tests import saved as kept
from tests.guarded import Guards
from tests.inputs import LONG_SIZES, OPERANDS, SIZES, exact_dtype, integers, operands, shapes
from tests.tolerances import activation_bound, assert_within, sum_bound

# These map whole numbers to whole numbers, so the result must be exact.
EXACT = {
    "identity": lambda Z: Z,
    "relu": lambda Z: Z.clip(0),
    "relu6": lambda Z: Z.clip(0, 6),
    "hardtanh": lambda Z: Z.clip(-1, 1),
}


def forward(
    backend: ModuleType, X: Array, W: Array, b: Array | None, activation: str = "identity",
    dropout: Dropout | None = None, phase: int = 0,
) -> tuple[Array, Array | None]:  # fmt: skip
    """The operator on guarded arrays."""
    guards = Guards(phase)
    shape = (len(X), len(W))
    Y = guards.output(shape, X.dtype)
    saved = kept.output(guards, backend, activation, shape, X.dtype)
    arguments = [guards.input(a) for a in (X, W, b)]
    got = backend.linear_forward(*arguments, activation, dropout, out=(Y, saved))
    guards.check()
    assert got[0] is Y
    assert saved is None or got[1] is saved
    return Y, saved


def check_integers(backend: ModuleType, dtype: np.dtype, sizes: tuple[int, ...], low: int) -> None:
    rng = np.random.default_rng(0)
    names = list(EXACT)
    for number, (batch, out_features, in_features) in enumerate(shapes(sizes, backend)):
        assert 64 * in_features + 8 < 2**24  # every partial sum is exact in float32
        X = integers(rng, (batch, in_features), dtype, low)
        W = integers(rng, (out_features, in_features), dtype, low)
        b = integers(rng, (out_features,), dtype, low) if number % 3 else None
        activation = names[number % 4]
        Y, saved = forward(backend, X, W, b, activation, phase=number % 2)
        # A float64 product of small whole numbers is the int64 product, and quicker.
        Z = X.astype(np.float64) @ W.T.astype(np.float64) + (0 if b is None else b)
        exact = EXACT[activation](Z).astype(dtype)
        assert np.array_equal(Y, exact), (batch, in_features, out_features, activation)
        if saved is not None:
            assert np.array_equal(saved, kept.as_kept(backend, activation, exact))


@pytest.mark.parametrize("low", [-8, 0], ids=["signed", "non-negative"])
def test_whole_numbers_are_exact(backend: ModuleType, dtype: np.dtype, low: int) -> None:
    check_integers(backend, dtype, SIZES, low)


@pytest.mark.long
@pytest.mark.parametrize("low", [-8, 0], ids=["signed", "non-negative"])
def test_whole_numbers_are_exact_in_large_shapes(
    backend: ModuleType, dtype: np.dtype, low: int
) -> None:
    check_integers(backend, dtype, LONG_SIZES, low)


def test_float64_product_of_whole_numbers_is_the_int64_product() -> None:
    rng = np.random.default_rng(0)
    X, W = (integers(rng, (33, 257), np.dtype(np.int64)) for _ in range(2))
    assert np.array_equal((X.astype(float) @ W.T.astype(float)).astype(np.int64), X @ W.T)


@pytest.mark.parametrize("kind", OPERANDS)
def test_product_is_within_its_bound(backend: ModuleType, dtype: np.dtype, kind: str) -> None:
    for batch, out_features, in_features in product((1, 7, 33), (1, 16, 49), (1, 2, 17, 64, 257)):
        X, W = operands(kind, batch, out_features, in_features, dtype)
        b = W[:, 0].copy()
        Y, _ = forward(backend, X, W, b)
        wide = exact_dtype(dtype)
        exact = X.astype(wide) @ W.T.astype(wide) + b.astype(wide)
        magnitude = np.abs(X).astype(wide) @ np.abs(W).T.astype(wide) + np.abs(b).astype(wide)
        bound = sum_bound(in_features + 1, magnitude, exact, dtype, kind == "constant")
        assert_within(Y, exact, bound, f"{kind} ({batch}, {in_features}) → {out_features}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_within_its_bound(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    act, slope = oracles.ACTIVATIONS[activation]
    for batch, out_features, in_features in ((1, 1, 1), (9, 33, 7), (65, 17, 48)):
        X, W = operands("normal", batch, out_features, in_features, dtype)
        W = W * dtype.type(3 / np.sqrt(in_features))  # Z reaches both tails
        Y, saved = forward(backend, X, W, None, activation)
        Z = X.astype(np.float64) @ W.T.astype(np.float64)
        magnitude = np.abs(X).astype(np.float64) @ np.abs(W).T.astype(np.float64)
        # In float64 the truth is rounded too, hence twice the sum's bound.
        error = 2 * sum_bound(in_features, magnitude, Z, dtype)
        steepest = np.max(np.abs([slope(Z - error), slope(Z), slope(Z + error)]), axis=0)
        exact = act(Z)
        bound = activation_bound(Z, error, exact, steepest, dtype)
        assert_within(Y, exact, bound, activation)
        kept.assert_saved(backend, activation, saved, Y, Z, error)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_tails_are_finite(backend: ModuleType, dtype: np.dtype, activation: str) -> None:
    z = np.array([[-1e30], [-700], [-90], [-1e-30], [0], [1e-30], [90], [700], [1e30]], dtype)
    act = oracles.ACTIVATIONS[activation][0]
    Y, _ = forward(backend, z, np.ones((1, 1), dtype), None, activation)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = act(z.astype(np.float64)).astype(dtype)
    if activation == "sin":  # any angle is right for a number whose spacing exceeds a turn
        assert np.isfinite(Y).all() and (np.abs(Y) <= 1).all()
        return
    tiny = np.finfo(dtype).tiny
    np.testing.assert_allclose(Y, exact, rtol=64 * np.finfo(dtype).eps, atol=90 * tiny)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_the_output_of_its_row_only(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    X, W = operands("normal", 19, 37, 23, dtype)
    clean, _ = forward(backend, X, W, None, activation)
    X[11, 5] = np.nan
    Y, saved = forward(backend, X, W, None, activation)
    assert np.isnan(Y[11]).all(), f"{activation} swallowed a NaN"
    if saved is not None and saved.dtype == dtype:
        assert np.isnan(saved[11]).all()
    assert np.array_equal(np.delete(Y, 11, axis=0), np.delete(clean, 11, axis=0))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinity_follows_ieee_rules(backend: ModuleType, dtype: np.dtype) -> None:
    X = np.array([[np.inf, 1], [-np.inf, 1], [np.inf, -np.inf]], dtype)
    W = np.ones((1, 2), dtype)
    for activation, expected in (
        ("identity", [np.inf, -np.inf, np.nan]),
        ("relu", [np.inf, 0, np.nan]),
        ("tanh", [1, -1, np.nan]),
        ("sigmoid", [1, 0, np.nan]),
        ("elu", [np.inf, -1, np.nan]),
    ):
        Y, _ = forward(backend, X, W, None, activation)
        np.testing.assert_array_equal(Y[:, 0], np.array(expected, dtype), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_is_what_the_table_says(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    X, W = operands("normal", 5, 3, 4, dtype)
    Y, saved = backend.linear_forward(X, W, None, activation)
    Z, _ = backend.linear_forward(X, W)
    what = {"Y": Y, "Z": Z, "": None}[ACTIVATIONS[activation].saves]
    expected = kept.as_kept(backend, activation, what)
    assert (saved is None) == (expected is None)
    assert saved is None or np.array_equal(saved, expected)


def test_operators_return_fresh_arrays_unless_given_some(
    backend: ModuleType, dtype: np.dtype
) -> None:
    X, W = operands("normal", 5, 3, 4, dtype)
    first, _ = backend.linear_forward(X, W)
    kept = first.copy()
    second, _ = backend.linear_forward(2 * X, W)
    assert np.array_equal(first, kept) and np.array_equal(second, 2 * kept)
