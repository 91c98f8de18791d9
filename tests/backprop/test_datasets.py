"""Data sets: shapes, what they are drawn from, and that blocks do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop import datasets
from backprop.datasets import BLOCK

GENERATORS: dict[str, tuple[Callable[..., Any], int, str | int]] = {  # features; "ids" or outputs
    "blobs": (datasets.blobs, 2, "ids"),
    "moons": (datasets.moons, 2, "ids"),
    "spirals": (datasets.spirals, 2, "ids"),
    "friedman": (datasets.friedman, 10, 0),
    "teacher": (datasets.teacher, 64, 1),
}
generators = pytest.mark.parametrize("name", GENERATORS)


@generators
@pytest.mark.parametrize("rows", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_the_first_rows_are_the_same_whatever_their_number(name: str, rows: int) -> None:
    make, features, target = GENERATORS[name]
    X, y = make(rows, seed=5)
    assert X.shape == (rows, features) and X.dtype == np.float32
    assert y.shape == ((rows, target) if target == 1 else (rows,))
    assert y.dtype == (np.int64 if target == "ids" else np.float32)
    more_X, more_y = make(3 * BLOCK, seed=5)
    np.testing.assert_array_equal(X, more_X[:rows])
    np.testing.assert_array_equal(y, more_y[:rows])
    assert len(np.unique(more_X, axis=0)) == 3 * BLOCK  # no block twice
    assert not np.array_equal(X, make(rows, seed=6)[0])


@generators
def test_streamed_slices_are_those_of_the_array(name: str) -> None:
    make = GENERATORS[name][0]
    whole, lazy = make(3 * BLOCK), make(3 * BLOCK, streamed=True)
    for matrix, drawn in zip(whole, lazy, strict=True):
        assert drawn.shape == matrix.shape and len(drawn) == len(matrix)
        for part in (
            slice(0, 1),
            slice(5, 5),
            slice(9, 4),
            slice(BLOCK - 1, 2 * BLOCK + 1),
            slice(None),
        ):
            np.testing.assert_array_equal(drawn[part], matrix[part])
        np.testing.assert_array_equal(drawn[3 * BLOCK - 2 : 10**9], matrix[-2:])
        with pytest.raises(bp.OptionError, match="expected rows as"):
            drawn[3]


def test_more_rows_than_any_memory_holds() -> None:
    X, _ = datasets.teacher(10**13, streamed=True)
    assert len(X) == 10**13
    assert np.isfinite(X[10**13 - 3 :]).all() and X[10**13 - 3 :].shape == (3, 64)


def test_fit_streams_them() -> None:
    X, y = datasets.friedman(3 * BLOCK, streamed=True)
    model = bp.MLP([10, 16, 1], device="reference")
    losses = bp.fit(model, X, y, optimizer=bp.Adam(lr=1e-2), epochs=2, batch_size=256)["loss"]
    assert losses[1] < losses[0] / 2


def test_blobs_are_clouds_around_their_centres() -> None:
    X, y = datasets.blobs(20_000, 6, 4, spread=0.5)
    assert np.bincount(y).min() > 4500
    for k in range(4):
        np.testing.assert_allclose(X[y == k].std(axis=0), 0.5, rtol=0.05)


def test_moons_and_spirals_without_noise_lie_on_their_curves() -> None:
    X, y = datasets.moons(1000, noise=0.0)
    centre = np.where(y[:, None] == 1, [1.0, 0.5], [0.0, 0.0])
    np.testing.assert_allclose(np.hypot(*(X - centre).T), 1, atol=1e-6)
    assert ((X[:, 1] >= -1e-6) | (y == 1)).all() and ((X[:, 1] <= 0.5 + 1e-6) | (y == 0)).all()
    X, y = datasets.spirals(1000, 3, turns=1.5, noise=0.0)
    radius = np.hypot(*X.T)
    angle = np.angle((X[:, 0] + 1j * X[:, 1]) * np.exp(-2j * np.pi * (1.5 * radius + y / 3)))
    np.testing.assert_allclose(angle[radius > 0.05], 0, atol=1e-4)


def test_friedman_is_its_formula_and_teacher_has_variance_one() -> None:
    X, y = (a.astype(np.float64) for a in datasets.friedman(5000, 7, noise=0.0))
    expected = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2
    np.testing.assert_allclose(y, expected + 10 * X[:, 3] + 5 * X[:, 4], atol=1e-4)
    for features in (4, 64, 300):
        variance = datasets.teacher(5000, features, 8, hidden=128)[1].var()
        assert 0.6 < variance < 1.6


def test_digits_are_scikit_learn_s() -> None:
    from sklearn.datasets import load_digits

    X, y = datasets.digits()
    expected = load_digits()
    np.testing.assert_array_equal(X, (expected.data / 16).astype(np.float32))
    np.testing.assert_array_equal(y, expected.target)


def test_what_is_not_installed_and_what_is_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("backprop.datasets.find_spec", lambda name: None)
        with pytest.raises(bp.MissingExtraError, match=r'pip install "fused-backprop\[sklearn\]"'):
            datasets.digits()
    for call, message in [
        (lambda: datasets.moons(0), "datasets.moons: rows"),
        (lambda: datasets.moons(3, seed=-1), "datasets.moons: seed"),
        (lambda: datasets.blobs(3, classes=0), "datasets.blobs: classes"),
        (lambda: datasets.friedman(3, 4), "datasets.friedman: features: expected 5 or more, got 4"),
    ]:
        with pytest.raises(bp.OptionError, match=message):
            call()
