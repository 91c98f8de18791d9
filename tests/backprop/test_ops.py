"""`bp.ops`: arrays of any layout in, the right backend, and never a lost update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backprop_kernels import reference

import backprop as bp

rng = np.random.default_rng(0)
X, W = rng.standard_normal((5, 4)), rng.standard_normal((3, 4))
b, dZ = rng.standard_normal(3), rng.standard_normal((5, 3))


def strided(array: np.ndarray) -> np.ndarray:
    """The same numbers, every second element of a larger array."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def test_inputs_of_any_layout_by_place_and_by_name() -> None:
    Y, _ = reference.linear_forward(X, W, b)
    for given in (np.asfortranarray(X), strided(X), X[::-1][::-1]):
        np.testing.assert_allclose(bp.ops.linear_forward(given, W, b)[0], Y, rtol=1e-13)
        np.testing.assert_allclose(
            bp.ops.linear_forward(b=strided(b), W=W, X=given)[0], Y, rtol=1e-13
        )
    dW = bp.ops.linear_wgrad(strided(dZ), X=np.asfortranarray(X))
    np.testing.assert_allclose(dW, dZ.T @ X, rtol=1e-13)
    weight = rng.random(5)
    value, *_ = bp.ops.loss(X, np.zeros((5, 4)), sample_weight=strided(weight))
    assert value == pytest.approx(np.average((X**2).mean(axis=1), weights=weight), rel=1e-13)


def test_complex_arrays_go_to_the_reference() -> None:
    Y, _ = bp.ops.linear_forward(X=X + 1e-200j, W=W + 0j, b=b + 0j, activation="tanh")
    assert Y.dtype == np.complex128
    slope = (1 - np.tanh(X @ W.T + b) ** 2) * W.sum(axis=1)
    np.testing.assert_allclose(Y.imag / 1e-200, slope, rtol=1e-12)


def test_updates_in_place_reach_the_caller() -> None:
    P, state = np.zeros(4), (np.zeros(4),)
    scalars = np.array([np.inf, 0.1, 0.0, 0.0, 0.0, 1.0])
    bp.ops.optimizer_step(P, np.ones(4), state, scalars, "SGD")
    assert P.tolist() == [-0.1] * 4 and state[0].tolist() == [1.0] * 4
    mean, var = np.zeros(4), np.ones(4)
    bp.ops.batch_norm_forward(X, np.ones(4), np.zeros(4), mean, running_var=var, momentum=1.0)
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(var, X.var(axis=0, ddof=1), rtol=1e-13)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "strided parameters": (
        lambda: bp.ops.optimizer_step(
            strided(np.zeros(4)), np.ones(4), (np.zeros(4),), np.ones(6), "SGD"
        ),
        bp.ShapeError,
        "optimizer_step: P: expected a C-contiguous array",
    ),
    "strided running mean": (
        lambda: bp.ops.batch_norm_forward(
            X, np.ones(4), np.zeros(4), strided(np.zeros(4)), np.ones(4)
        ),
        bp.ShapeError,
        "batch_norm_forward: running_mean: expected a C-contiguous array",
    ),
    "strided output": (
        lambda: bp.ops.layer_norm_forward(
            X, np.ones(4), np.zeros(4), out=(np.empty((4, 5)).T, None, None, None)
        ),
        bp.ShapeError,
        "layer_norm_forward: out_Y: expected a C-contiguous array",
    ),
    "mixed kinds by name": (
        lambda: bp.ops.linear_forward(X, W=W + 0j),
        bp.KindError,
        "linear_forward: expected arrays of one kind, got a mix of complex numpy and numpy",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_or_misread_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
