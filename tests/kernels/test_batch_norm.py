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

SHAPES = ((1, 1), (1, 7), (2, 2), (16, 3), (33, 9), (64, 17), (48, 65), (31, 97), (257, 5))


def drawn(shape: tuple[int, int], dtype: np.dtype) -> list[Array]:
    """X with columns of different place and width, gamma, beta and a gradient dZ."""
    rng = np.random.default_rng(shape[0])
    features = shape[1]
    X = rng.standard_normal(shape) * rng.uniform(0.5, 2, features) + rng.uniform(-2, 2, features)
    gamma, beta = rng.uniform(-2, 2, features), rng.standard_normal(features)
    return [a.astype(dtype) for a in (X, gamma, beta, rng.standard_normal(shape))]


def forward(
    backend: ModuleType, X: Array, gamma: Array, beta: Array, running: list[Array],
    training: bool = True, momentum: float = 0.1, eps: float = 1e-5, activation: str = "identity",
    phase: int = 0,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """The operator on guarded arrays; `running` is updated as the operator does."""
    guards = Guards(phase)
    features = X.shape[1:]
    out = (
        guards.output(X.shape, X.dtype),
        kept.output(guards, backend, activation, X.shape, X.dtype),
        guards.output(features, X.dtype),
        guards.output(features, X.dtype),
    )
    arguments = [guards.input(a) for a in (X, gamma, beta)]
    held = [guards.inout(r) for r in running]
    backend.batch_norm_forward(
        *arguments, *held, training, momentum, eps, activation, None, out=out
    )
    guards.check()
    for old, new in zip(running, held, strict=True):
        old[...] = new
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
    taken = kept.arguments(backend, "batch_norm_backward", (*arrays, activation))[:-1]
    backend.batch_norm_backward(*map(guards.input, taken), activation, None, out=out)
    guards.check()
    return out


def fresh(features: int, dtype: np.dtype) -> list[Array]:
    return [np.zeros(features, dtype), np.ones(features, dtype)]


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_training_is_within_its_bound(backend: ModuleType, dtype: np.dtype, eps: float) -> None:
    for number, shape in enumerate(SHAPES):
        X, gamma, beta, _ = drawn(shape, dtype)
        running = fresh(shape[1], dtype)
        Y, _, mean, rstd = forward(
            backend, X, gamma, beta, running, momentum=0.25, eps=eps, phase=number % 2
        )
        wide = X.astype(np.longdouble)
        exact_mean, exact_rstd = wide.mean(axis=0), 1 / np.sqrt(wide.var(axis=0) + eps)
        roundings = (FORMULA + 2 * np.sqrt(shape[0])) * unit(dtype)
        size = np.abs(X).mean(axis=0)
        assert_within(mean, exact_mean, roundings * size, f"mean of {shape}")
        spread = 1 + exact_rstd * size
        assert_within(rstd, exact_rstd, roundings * exact_rstd * spread, f"rstd of {shape}")
        shift = (np.abs(X) + size) * exact_rstd
        bound = roundings * (shift * np.abs(gamma) * spread + np.abs(beta))
        exact = (wide - exact_mean) * exact_rstd * gamma + beta
        assert_within(Y, exact, bound, f"Y of {shape}")
        # PyTorch: running ← (1 − momentum) running + momentum observed, variance unbiased.
        assert_within(running[0], exact_mean / 4, roundings * size, "running mean")
        if shape[0] > 1:
            unbiased = wide.var(axis=0, ddof=1)
            bound = roundings * (1 + unbiased + size * np.sqrt(unbiased))
            assert_within(running[1], 0.75 + 0.25 * unbiased, bound, "running variance")


def test_prediction_uses_the_running_statistics(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta, _ = drawn((17, 33), dtype)
    rng = np.random.default_rng(1)
    running = [rng.standard_normal(33).astype(dtype), rng.uniform(0.5, 2, 33).astype(dtype)]
    before = [r.copy() for r in running]
    Y, _, mean, rstd = forward(backend, X, gamma, beta, running, training=False)
    assert all(np.array_equal(a, b) for a, b in zip(running, before, strict=True))
    place, width = (r.astype(np.longdouble) for r in running)
    exact_rstd = 1 / np.sqrt(width + 1e-5)
    assert np.array_equal(mean, running[0])
    assert_within(rstd, exact_rstd, FORMULA * unit(dtype) * exact_rstd, "rstd")
    exact = (X - place) * exact_rstd * gamma + beta
    size = (np.abs(X) + np.abs(place)) * exact_rstd * np.abs(gamma) + np.abs(beta)
    assert_within(Y, exact, FORMULA * unit(dtype) * size, "Y")
    alone, *_ = forward(backend, X[5:6].copy(), gamma, beta, running, training=False)
    assert np.array_equal(alone[0], Y[5])  # a row's prediction does not depend on its batch


def test_many_batches_move_the_running_statistics(backend: ModuleType, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    gamma, beta = np.ones(3, dtype), np.zeros(3, dtype)
    running = fresh(3, dtype)
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(10):
        X = (rng.standard_normal((7, 3)) * 3 + 2).astype(dtype)
        forward(backend, X, gamma, beta, running)
        mean = 0.9 * mean + 0.1 * X.mean(axis=0, dtype=np.float64)
        var = 0.9 * var + 0.1 * X.astype(np.float64).var(axis=0, ddof=1)
    np.testing.assert_allclose(running[0], mean, rtol=64 * unit(dtype), atol=64 * unit(dtype))
    np.testing.assert_allclose(running[1], var, rtol=64 * unit(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_follows_the_norm(backend: ModuleType, dtype: np.dtype, activation: str) -> None:
    act, slope = oracles.ACTIVATIONS[activation]
    X, gamma, beta, _ = drawn((33, 9), dtype)
    Z, *_ = forward(backend, X, gamma, beta, fresh(9, dtype))
    Y, saved, *_ = forward(backend, X, gamma, beta, fresh(9, dtype), activation=activation)
    wide = Z.astype(np.float64)
    error = FORMULA * unit(dtype) * (1 + np.abs(wide))
    bound = activation_bound(wide, error, act(wide), np.abs(slope(wide)), dtype)
    assert_within(Y, act(wide), bound, activation)
    kept.assert_saved(backend, activation, saved, Y, wide, error)


def check_backward(backend: ModuleType, shape: tuple[int, int], dtype: np.dtype, act: str) -> None:
    X, gamma, _, dZ = drawn(shape, dtype)
    wide_dZ, wide_X, wide_gamma = (a.astype(np.float64) for a in (dZ, X, gamma))
    stats = [wide_X.mean(axis=0).astype(dtype), (1 / (wide_X.std(axis=0) + 0.1)).astype(dtype)]
    mean, rstd = (s.astype(np.float64) for s in stats)
    below = np.random.default_rng(9).standard_normal(shape).astype(dtype)
    below_Z = below.astype(np.float64)
    value, slope = oracles.ACTIVATIONS[act]
    saved = {"Y": value(below_Z), "Z": below_Z, "": None}[ACTIVATIONS[act].saves]
    saved = None if saved is None else saved.astype(dtype)

    dZ_prev, db_prev, dgamma = backward(backend, dZ, X, gamma, *stats, saved, activation=act)

    dX, _, exact_dgamma = reference.batch_norm_backward(wide_dZ, wide_X, wide_gamma, mean, rstd)
    X_hat = (wide_X - mean) * rstd
    slack = (np.abs(wide_X) + np.abs(mean)) * rstd  # X_hat is good to u times this
    size = np.abs(wide_dZ)
    terms = size + size.mean(axis=0) + (1 + slack) * (size * (1 + slack)).mean(axis=0)
    roundings = (FORMULA + 2 * np.sqrt(shape[0])) * unit(dtype)
    error = roundings * np.abs(wide_gamma) * rstd * terms
    bound = derivative_bound(dX, error, below_Z, slope(below_Z), dtype)
    assert_within(dZ_prev, dX * slope(below_Z), bound, f"dZ_prev of {shape}")
    bound = roundings * (size * (np.abs(X_hat) + slack)).sum(axis=0)
    assert_within(dgamma, exact_dgamma, bound, f"dgamma of {shape}")
    stored = dZ_prev.astype(np.float64)
    # dX sums to 0 over a column: what is left of db is the roundings of its terms.
    bound = 2 * sum_bound(shape[0], np.abs(stored).sum(axis=0), stored.sum(axis=0), dtype)
    assert_within(db_prev, stored.sum(axis=0), bound, f"db_prev of {shape}")


def test_backward_is_within_its_bound(backend: ModuleType, dtype: np.dtype) -> None:
    for shape in SHAPES:
        check_backward(backend, shape, dtype, "identity")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_carries_the_layer_below(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    check_backward(backend, (33, 9), dtype, activation)
    check_backward(backend, (16, 97), dtype, activation)


@pytest.mark.parametrize("level", [0.0, 1.0, 1e20, -1e24])
def test_constant_columns_are_finite(backend: ModuleType, dtype: np.dtype, level: float) -> None:
    X = np.full((33, 3), level, dtype)
    gamma, beta = np.ones(3, dtype), np.full(3, 0.5, dtype)
    running = fresh(3, dtype)
    Y, _, mean, rstd = forward(backend, X, gamma, beta, running)
    assert all(np.isfinite(a).all() for a in (Y, mean, rstd, *running))
    if abs(level) <= 1:
        assert np.array_equal(Y, np.full_like(X, 0.5))
    dZ = np.random.default_rng(0).standard_normal((33, 3)).astype(dtype)
    gradients = backward(backend, dZ, X, gamma, mean, rstd, None)
    assert all(np.isfinite(a).all() for a in gradients)


def test_variance_does_not_cancel(backend: ModuleType, dtype: np.dtype) -> None:
    """E[x²] − E[x]² would lose every digit of this column's width."""
    place = 1e4 if dtype == np.float32 else 1e8
    signs = np.tile([-1.0, 1.0], 16)[:, None]
    X = np.add(place, signs).astype(dtype)
    ones, zeros = np.ones(1, dtype), np.zeros(1, dtype)
    Y, _, _, rstd = forward(backend, X, ones, zeros, fresh(1, dtype), eps=1e-30)
    assert np.array_equal(Y, signs) and rstd[0] == 1


def test_nan_poisons_its_column_only(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta, _ = drawn((33, 9), dtype)
    clean, *_ = forward(backend, X, gamma, beta, fresh(9, dtype), activation="relu")
    X[4, 7] = np.nan
    Y, *_ = forward(backend, X, gamma, beta, fresh(9, dtype), activation="relu")
    assert np.isnan(Y[:, 7]).all()
    assert np.array_equal(np.delete(Y, 7, axis=1), np.delete(clean, 7, axis=1))


def test_empty_batch(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta = np.zeros((0, 5), dtype), np.ones(5, dtype), np.ones(5, dtype)
    running = fresh(5, dtype)
    Y, _, mean, rstd = forward(backend, X, gamma, beta, running)
    assert Y.shape == (0, 5) and not running[0].any() and (running[1] == 1).all()
    dX, db, dgamma = backward(backend, X, X, gamma, mean, rstd, None)
    assert dX.shape == (0, 5) and not db.any() and not dgamma.any()


def test_layer_below_may_want_nothing(backend: ModuleType, dtype: np.dtype) -> None:
    X, gamma, beta, dZ = drawn((33, 9), dtype)
    _, _, mean, rstd = forward(backend, X, gamma, beta, fresh(9, dtype))
    _, _, expected = backward(backend, dZ, X, gamma, mean, rstd, None)
    dgamma = np.full(9, np.nan, dtype)
    backend.batch_norm_backward(dZ, X, gamma, mean, rstd, out=(None, None, dgamma))
    assert np.array_equal(dgamma, expected)
