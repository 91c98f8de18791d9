from __future__ import annotations

from itertools import product
from types import ModuleType

import numpy as np
import pytest
from backprop_kernels.arrays import Array

from tests.guarded import Guards
from tests.inputs import LONG_SIZES, OPERANDS, SIZES, exact_dtype, integers, operands, shapes
from tests.tolerances import assert_within, sum_bound


def wgrad(backend: ModuleType, dZ: Array, X: Array, phase: int = 0) -> Array:
    """The operator on guarded arrays."""
    guards = Guards(phase)
    dW = guards.output((dZ.shape[1], X.shape[1]), dZ.dtype)
    got = backend.linear_wgrad(guards.input(dZ), guards.input(X), out=dW)
    guards.check()
    assert got is dW
    return dW


def check_integers(backend: ModuleType, dtype: np.dtype, sizes: tuple[int, ...], low: int) -> None:
    rng = np.random.default_rng(0)
    for number, (out_features, in_features, batch) in enumerate(shapes(sizes, backend)):
        assert 64 * batch < 2**24
        dZ = integers(rng, (batch, out_features), dtype, low)
        X = integers(rng, (batch, in_features), dtype, low)
        exact = dZ.T.astype(np.float64) @ X.astype(np.float64)
        dW = wgrad(backend, dZ, X, phase=number % 2)
        assert np.array_equal(dW, exact), (batch, in_features, out_features)


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
    for out_features, in_features, batch in product((1, 7, 33), (1, 16, 49), (1, 2, 17, 64, 257)):
        A, B = operands(kind, out_features, in_features, batch, dtype)
        dZ, X = np.ascontiguousarray(A.T), np.ascontiguousarray(B.T)
        wide = exact_dtype(dtype)
        exact = dZ.T.astype(wide) @ X.astype(wide)
        magnitude = np.abs(dZ).T.astype(wide) @ np.abs(X).astype(wide)
        bound = sum_bound(batch, magnitude, exact, dtype, kind == "constant")
        what = f"{kind} ({batch}, {in_features}) → {out_features}"
        assert_within(wgrad(backend, dZ, X), exact, bound, what)


def test_gradient_is_assigned_not_added(backend: ModuleType, dtype: np.dtype) -> None:
    dZ, X = (a.T.copy() for a in operands("normal", 5, 9, 33, dtype))
    dW = wgrad(backend, dZ, X)
    again = dW.copy()
    backend.linear_wgrad(dZ, X, out=again)
    assert np.array_equal(again, dW)


def test_nan_reaches_its_unit_and_its_input_only(backend: ModuleType, dtype: np.dtype) -> None:
    dZ, X = (a.T.copy() for a in operands("normal", 13, 19, 65, dtype))
    clean = wgrad(backend, dZ, X)
    dZ[40, 3] = np.nan
    X[50, 7] = np.nan
    dW = wgrad(backend, dZ, X)
    poisoned = np.zeros_like(dW, bool)
    poisoned[3], poisoned[:, 7] = True, True
    assert np.array_equal(np.isnan(dW), poisoned)
    assert np.array_equal(dW[~poisoned], clean[~poisoned])
