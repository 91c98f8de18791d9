"""The metrics agree with scikit-learn, are exact where it rounds, and refuse what is undefined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backprop_kernels.errors import BackpropError, DataError, ShapeError
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from backprop import metrics

NAN = float("nan")
ONE_CLASS = "y: expected rows of both classes with weight, got one class"
NO_CLASS = "y: expected class indices 0 to 1, got others"
NOT_FINITE = "expected finite numbers, got NaN or infinity"
NO_ROWS = "y: expected at least one row, got none"


def binary(rows: int, levels: int, seed: int) -> tuple[Any, Any, Any]:
    """Labels of both classes, scores with `levels` distinct values, weights some of which are 0."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, rows).astype(np.float32)
    y[:2] = 0, 1
    score = rng.integers(0, levels, rows) / levels + 0.1 * y
    weight = rng.random(rows) * (rng.random(rows) < 0.8)
    weight[:2] = 1
    return y, score, weight


@pytest.mark.parametrize("levels", [1, 3, 50, 10**9])
@pytest.mark.parametrize("rows", [2, 17, 1000])
def test_auc_agrees_with_sklearn(rows: int, levels: int) -> None:
    y, score, weight = binary(rows, levels, seed=rows + levels)
    expected = sklearn_metrics.roc_auc_score(y, score)
    assert metrics.auc(y, score) == pytest.approx(expected, rel=1e-13, abs=1e-14)
    expected = sklearn_metrics.roc_auc_score(y, score, sample_weight=weight)
    assert metrics.auc(y, score, weight) == pytest.approx(expected, rel=1e-12, abs=1e-13)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=25))
def test_auc_is_the_share_of_pairs_won(rows: list[tuple[bool, int]]) -> None:
    above = [score for positive, score in rows if positive]
    below = [score for positive, score in rows if not positive]
    y = [positive for positive, _ in rows]
    score = [score for _, score in rows]
    if not above or not below:
        with pytest.raises(DataError):
            metrics.auc(y, score)
        return
    won = sum((a > b) + 0.5 * (a == b) for a in above for b in below)
    assert metrics.auc(y, score) == won / (len(above) * len(below))


def test_auc_known_values() -> None:
    assert metrics.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert metrics.auc([0, 1, 0, 1], [5.0, 5.0, 5.0, 5.0]) == 0.5
    assert metrics.auc([0, 1], [1.0, 2.0]) == 1.0
    assert metrics.auc([0, 1], [2.0, 1.0]) == 0.0
    # A weight of 3 is three rows.
    weighted = metrics.auc([0, 0, 1, 1], [1, 3, 2, 3], [3, 1, 2, 1])
    assert weighted == metrics.auc([0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 3, 2, 2, 3])


def test_auc_tells_neighbouring_scores_apart() -> None:
    assert metrics.auc([0, 1], [1.0, 1.0 + np.spacing(1.0)]) == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_log_loss_agrees_with_sklearn(classes: int, dtype: Any) -> None:
    rng = np.random.default_rng(classes)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, 500)])
    p = rng.dirichlet(np.ones(classes), len(y)).astype(dtype)
    tolerance = 1e-6 if dtype == np.float32 else 1e-12
    expected = sklearn_metrics.log_loss(y, p)
    assert metrics.log_loss(y, p) == pytest.approx(expected, rel=tolerance)
    if classes == 2:
        expected = sklearn_metrics.log_loss(y, p[:, 1])
        assert metrics.log_loss(y, p[:, 1]) == pytest.approx(expected, rel=tolerance)


def test_log_loss_known_values() -> None:
    expected = -np.log(0.5 * 0.25) / 2
    assert metrics.log_loss([1, 0], [0.5, 0.75]) == pytest.approx(expected, rel=1e-15)
    assert metrics.log_loss([2], [[0.25, 0.25, 0.5]]) == pytest.approx(np.log(2), rel=1e-15)
    # Certain and wrong costs −log of the dtype's rounding step, not infinity.
    for dtype in (np.float32, np.float64):
        p = np.array([0.0, 1.0], dtype)
        assert metrics.log_loss([1, 0], p) == pytest.approx(-np.log(np.finfo(dtype).eps), rel=1e-12)
        assert metrics.log_loss([0, 1], p) == pytest.approx(np.finfo(dtype).eps, rel=1e-6)


@pytest.mark.parametrize("rows", [2, 5, 1000])
def test_regression_metrics_agree_with_sklearn(rows: int) -> None:
    rng = np.random.default_rng(rows)
    y = rng.normal(3, 10, rows)
    predicted = (y + rng.normal(0, 4, rows)).astype(np.float32)
    for ours, theirs in (
        (metrics.r2, sklearn_metrics.r2_score),
        (metrics.mae, sklearn_metrics.mean_absolute_error),
        (metrics.rmse, sklearn_metrics.root_mean_squared_error),
    ):
        assert ours(y, predicted) == pytest.approx(theirs(y, predicted), rel=1e-12)


def test_regression_known_values() -> None:
    assert metrics.r2([1, 2, 3], [1, 2, 5]) == -1.0
    assert metrics.mae([1, 2, 3], [1, 2, 5]) == pytest.approx(2 / 3, rel=1e-15)
    assert metrics.rmse([1, 2, 3], [1, 2, 5]) == pytest.approx(np.sqrt(4 / 3), rel=1e-15)
    # The mean of 0.1, 0.1, 0.1 is not quite 0.1: a constant y is found by equality.
    assert metrics.r2([0.1] * 3, [0.1] * 3) == 1.0
    assert metrics.r2([0.1] * 3, [0.1, 0.1, 0.2]) == 0.0


def test_accuracy_of_numbers_and_strings() -> None:
    assert metrics.accuracy([0, 1, 2, 2], [0.0, 1.0, 1.0, 2.0]) == 0.75
    assert metrics.accuracy(["a", "b", "a"], ["a", "b", "b"]) == 2 / 3
    assert metrics.accuracy(np.array([0.0, 1.0]), np.array([False, True])) == 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "error", "wrong"),
    [
        ("auc", ([0, 2], [1, 2]), DataError, "y: expected labels 0 and 1, got [0. 2.]"),
        (
            "auc",
            ([0, 1], [1, NAN]),
            DataError,
            "score: " + NOT_FINITE,
        ),
        ("auc", ([1, 1], [1, 2]), DataError, ONE_CLASS),
        ("auc", ([0, 1], [1, 2], [1, 0]), DataError, ONE_CLASS),
        (
            "auc",
            ([0, 1], [1, 2], [1, -1]),
            DataError,
            "sample_weight: expected no negative weight, got -1.0",
        ),
        (
            "auc",
            ([0, 1], [[1], [2]]),
            ShapeError,
            "score: expected the shape (2,) of y, got (2, 1)",
        ),
        (
            "auc",
            ([0, 1], [1, 2], [1]),
            ShapeError,
            "sample_weight: expected the shape (2,) of y, got (1,)",
        ),
        ("log_loss", ([0, 2], [0.5, 0.5]), DataError, NO_CLASS),
        ("log_loss", ([0, -1], [0.5, 0.5]), DataError, NO_CLASS),
        ("log_loss", ([0, 0.5], [0.5, 0.5]), DataError, NO_CLASS),
        (
            "log_loss",
            ([0, 1], [0.5, 1.5]),
            DataError,
            "p: expected probabilities 0 to 1, got 0.5 to 1.5",
        ),
        (
            "log_loss",
            ([0, 1], [0.5, NAN]),
            DataError,
            "p: " + NOT_FINITE,
        ),
        (
            "log_loss",
            ([0, 1], [0.5]),
            ShapeError,
            "p: expected shape (2,) or (2, classes), got (1,)",
        ),
        ("log_loss", ([[0], [1]], [0.5, 0.5]), ShapeError, "y: expected shape (rows,), got (2, 1)"),
        ("log_loss", ([], []), DataError, NO_ROWS),
        (
            "accuracy",
            ([0, 1], [[0, 1]]),
            ShapeError,
            "predicted: expected the shape (2,) of y, got (1, 2)",
        ),
        ("accuracy", ([], []), DataError, NO_ROWS),
        (
            "mae",
            ([1, 2], [[1], [2]]),
            ShapeError,
            "predicted: expected the shape (2,) of y, got (2, 1)",
        ),
        ("rmse", ([1, NAN], [1, 2]), DataError, "y: " + NOT_FINITE),
        ("r2", ([1], [1]), DataError, "y: expected at least 2 rows, got 1"),
    ],
)
def test_undefined_metrics_are_refused(
    name: str, arguments: tuple[Any, ...], error: type[BackpropError], wrong: str
) -> None:
    with pytest.raises(error) as caught:
        getattr(metrics, name)(*arguments)
    assert str(caught.value) == f"{name}: {wrong}"
