from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backprop_kernels import reference
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array

from tests import oracles
from tests import saved as kept
from tests.guarded import Guards
from tests.tolerances import (
    FORMULA,
    activation_bound,
    assert_within,
    derivative_bound,
    sum_bound,
    unit,
)

SHAPES = ((1, 1), (1, 7), (2, 2), (3, 16), (9, 33), (17, 64), (65, 48), (97, 31), (5, 257))


def drawn(shape: tuple[int, int], dtype: np.dtype) -> list[Array]:
    """X with rows of different place and width, gamma, beta and a gradient dZ."""
    rng = np.random.default_rng(shape[0])
    X = rng.standard_normal(shape) * rng.uniform(0.5, 2, (shape[0], 1)) + rng.uniform(-2, 2)
    gamma, beta = rng.uniform(-2, 2, shape[1]), rng.standard_normal(shape[1])
    return [a.astype(dtype) for a in (X, gamma, beta, rng.standard_normal(shape))]


def forward(
    backend: ModuleType, X: Array, gamma: Array, beta: Array, activation: str = "identity",
    eps: float = 1e-5, phase: int = 0,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """The operator on guarded arrays."""
    guards = Guards(phase)
    out = (
        guards.output(X.shape, X.dtype),
        kept.output(guards, backend, activation, X.shape, X.dtype),
        guards.output(X.shape[:1], X.dtype),
        guards.output(X.shape[:1], X.dtype),
    )
    arguments = [guards.input(a) for a in (X, gamma, beta)]
    backend.layer_norm_forward(*arguments, eps, activation, None, out=out)
    guards.check()
    return out


def backward(backend: ModuleType, *arrays: Array | None, activation: str = "identity") -> Any:
    """dZ, X, gamma, mean, rstd, saved → the outputs, on guarded arrays."""
    guards = Guards()
    dZ: Array = arrays[0]
    out = (
        guards.output(dZ.shape, dZ.dtype),
        guards.output(dZ.shape[1:], dZ.dtype),
        guards.output(dZ.shape[1:], dZ.dtype),
    )
    taken = kept.arguments(backend, "layer_norm_backward", (*arrays, activation))[:-1]
    backend.layer_norm_backward(*map(guards.input, taken), activation, None, out=out)
    guards.check()
    return out


def exact_forward(X: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array]:
    X, gamma, beta = (a.astype(np.longdouble) for a in (X, gamma, beta))
    mean, rstd = X.mean(axis=1), 1 / np.sqrt(X.var(axis=1) + eps)
    return (X - mean[:, None]) * rstd[:, None] * gamma + beta, mean, rstd


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_forward_is_within_its_bound(backend: ModuleType, dtype: np.dtype, eps: float) -> None:
    for number, shape in enumerate(SHAPES):
        X, gamma, beta, _ = drawn(shape, dtype)
        Y, _, mean, rstd = forward(backend, X, gamma, beta, "identity", eps, number % 2)
        Z, exact_mean, exact_rstd = exact_forward(X, gamma, beta, eps)
        roundings = (FORMULA + 2 * np.sqrt(shape[1])) * unit(dtype)
        size = np.abs(X).mean(axis=1)
        assert_within(mean, exact_mean, roundings * size, f"mean of {shape}")
        # Where a row is narrow against its place, the mean's error shows in its width.
        spread = 1 + exact_rstd * size
        assert_within(rstd, exact_rstd, roundings * exact_rstd * spread, f"rstd of {shape}")
        shift = (np.abs(X) + size[:, None]) * exact_rstd[:, None]
        bound = roundings * (shift * np.abs(gamma) * spread[:, None] + np.abs(beta))
        assert_within(Y, Z, bound, f"Y of {shape}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_follows_the_norm(backend: ModuleType, dtype: np.dtype, activation: str) -> None:
    act, slope = oracles.ACTIVATIONS[activation]
    X, gamma, beta, _ = drawn((9, 33), dtype)
    Z, *_ = forward(backend, X, gamma, beta)
    Y, saved, *_ = forward(backend, X, gamma, beta, activation)
    wide = Z.astype(np.float64)
    error = FORMULA * unit(dtype) * (1 + np.abs(wide))
    bound = activation_bound(wide, error, act(wide), np.abs(slope(wide)), dtype)
    assert_within(Y, act(wide), bound, activation)
    kept.assert_saved(backend, activation, saved, Y, wide, error)


def check_backward(backend: ModuleType, shape: tuple[int, int], dtype: np.dtype, act: str) -> None:
    X, gamma, _, dZ = drawn(shape, dtype)
    wide_dZ, wide_X, wide_gamma = (a.astype(np.float64) for a in (dZ, X, gamma))
    _, _, mean, rstd = reference.layer_norm_forward(wide_X, wide_gamma, 0 * wide_gamma)
    stats = [mean.astype(dtype), rstd.astype(dtype)]
    mean, rstd = (s.astype(np.float64) for s in stats)
    below = np.random.default_rng(9).standard_normal(shape).astype(dtype)
    below_Z = below.astype(np.float64)
    value, slope = oracles.ACTIVATIONS[act]
    saved = {"Y": value(below_Z), "Z": below_Z, "": None}[ACTIVATIONS[act].saves]
    saved = None if saved is None else saved.astype(dtype)

    dZ_prev, db_prev, dgamma = backward(backend, dZ, X, gamma, *stats, saved, activation=act)

    dX, _, exact_dgamma = reference.layer_norm_backward(wide_dZ, wide_X, wide_gamma, mean, rstd)
    X_hat = (wide_X - mean[:, None]) * rstd[:, None]
    slack = (np.abs(wide_X) + np.abs(mean[:, None])) * rstd[:, None]  # X_hat is good to u of this
    spread = (1 + slack) ** 2
    dX_hat = np.abs(wide_dZ * wide_gamma)
    terms = dX_hat + dX_hat.mean(axis=1, keepdims=True)
    terms += (1 + np.abs(X_hat)) * (dX_hat * spread).mean(axis=1, keepdims=True)
    roundings = (FORMULA + 2 * np.sqrt(shape[1])) * unit(dtype)
    error = roundings * rstd[:, None] * terms * spread
    bound = derivative_bound(dX, error, below_Z, slope(below_Z), dtype)
    assert_within(dZ_prev, dX * slope(below_Z), bound, f"dZ_prev of {shape}")
    roundings = (FORMULA + 2 * np.sqrt(shape[0])) * unit(dtype)
    bound = roundings * (np.abs(wide_dZ) * (np.abs(X_hat) + slack)).sum(axis=0)
    assert_within(dgamma, exact_dgamma, bound, f"dgamma of {shape}")
    stored = dZ_prev.astype(np.float64)
    bound = 2 * sum_bound(shape[0], np.abs(stored).sum(axis=0), stored.sum(axis=0), dtype)
    assert_within(db_prev, stored.sum(axis=0), bound, f"db_prev of {shape}")


def test_backward_is_within_its_bound(backend: ModuleType, dtype: np.dtype) -> None:
    for shape in SHAPES:
        check_backward(backend, shape, dtype, "identity")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_carries_the_layer_below(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    check_backward(backend, (9, 33), dtype, activation)
    check_backward(backend, (97, 16), dtype, activation)


@pytest.mark.parametrize("level", [0.0, 1.0, 1e20, -1e24])
def test_constant_rows_are_finite(backend: ModuleType, dtype: np.dtype, level: float) -> None:
    X = np.full((3, 33), level, dtype)
    gamma, beta = np.ones(33, dtype), np.full(33, 0.5, dtype)
    Y, _, mean, rstd = forward(backend, X, gamma, beta)
    assert all(np.isfinite(a).all() for a in (Y, mean, rstd))
    if abs(level) <= 1:
        assert np.array_equal(Y, np.full_like(X, 0.5))
    dZ = np.random.default_rng(0).standard_normal((3, 33)).astype(dtype)
    gradients = backward(backend, dZ, X, gamma, mean, rstd, None)
    assert all(np.isfinite(a).all() for a in gradients)


def test_variance_does_not_cancel(backend: ModuleType, dtype: np.dtype) -> None:
    """E[x²] − E[x]² would lose every digit of these rows' width."""
    place = 1e4 if dtype == np.float32 else 1e8
    X = np.tile([place - 1, place + 1], 16)[None].astype(dtype)
    Y, _, _, rstd = forward(backend, X, np.ones(32, dtype), np.zeros(32, dtype), eps=1e-30)
    assert np.array_equal(Y, np.tile([-1.0, 1.0], 16)[None]) and rstd[0] == 1


def test_nan_poisons_its_row_only(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta, _ = drawn((9, 33), dtype)
    clean, *_ = forward(backend, X, gamma, beta, "relu")
    X[4, 7] = np.nan
    Y, *_ = forward(backend, X, gamma, beta, "relu")
    assert np.isnan(Y[4]).all()
    assert np.array_equal(np.delete(Y, 4, axis=0), np.delete(clean, 4, axis=0))


def test_empty_batch(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta = np.zeros((0, 5), dtype), np.ones(5, dtype), np.ones(5, dtype)
    Y, _, mean, rstd = forward(backend, X, gamma, beta)
    assert Y.shape == (0, 5)
    dX, db, dgamma = backward(backend, X, X, gamma, mean, rstd, None)
    assert dX.shape == (0, 5) and not db.any() and not dgamma.any()


def test_layer_below_may_want_nothing(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta, dZ = drawn((9, 33), dtype)
    _, _, mean, rstd = forward(backend, X, gamma, beta)
    _, _, expected = backward(backend, dZ, X, gamma, mean, rstd, None)
    dgamma = np.full(33, np.nan, dtype)
    backend.layer_norm_backward(dZ, X, gamma, mean, rstd, out=(None, None, dgamma))
    assert np.array_equal(dgamma, expected)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_not_centred_is_rms_norm(backend: ModuleType, dtype: np.dtype, activation: str) -> None:
    """Forward against the formula, backward against complex step of the formula."""
    for shape in ((1, 1), (3, 16), (9, 33), (97, 31)):
        X, gamma, beta, dZ = drawn(shape, dtype)
        Y, mean, rstd = (np.empty(n, dtype) for n in (shape, shape[0], shape[0]))
        backend.layer_norm_forward(X, gamma, beta, 1e-3, out=(Y, None, mean, rstd), centred=False)
        x, g, b, d = (a.astype(np.longdouble) for a in (X, gamma, beta, dZ))

        def rms_norm(x: Array, g: Array = g, b: Array = b) -> Array:
            return g * x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-3) + b

        exact = rms_norm(x)
        roundings = (FORMULA + 2 * np.sqrt(shape[1])) * unit(dtype)
        assert not mean.any()
        assert_within(Y, exact, roundings * (np.abs(exact) + 2 * np.abs(b)), f"Y of {shape}")

        below = drawn(shape, dtype)[3]
        out = tuple(np.empty(n, dtype) for n in (shape, shape[1], shape[1]))
        backend.layer_norm_backward(
            dZ, X, gamma, mean, rstd, below, activation, out=out, centred=False
        )
        slope = oracles.ACTIVATIONS[activation][1](below.astype(float))
        h, exact_dX = 1e-200, np.empty(shape, np.longdouble)
        for column in range(shape[1]):
            nudged = x.astype(np.clongdouble)
            nudged[:, column] += 1j * h
            exact_dX[:, column] = (d * rms_norm(nudged)).sum(axis=1).imag / h
        scale = rstd[:, None] * np.abs(dZ * gamma).max() * (1 + np.abs(x) * rstd[:, None])
        bound = 4 * roundings * scale * (np.abs(slope) + 1)
        assert_within(out[0], exact_dX * slope, bound, f"dX of {shape}")
        bound = 4 * roundings * np.sqrt(shape[0]) * np.abs(d * x * rstd[:, None]).sum(axis=0)
        assert_within(out[2], (d * x * rstd[:, None]).sum(axis=0), bound, f"dgamma of {shape}")
