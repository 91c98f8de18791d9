"""How good predictions are: plain NumPy, in float64, agreeing with scikit-learn's definitions.

`y` and the predictions have one shape, (rows,) unless said otherwise. A ShapeError is raised when
they differ, because NumPy would broadcast (rows, 1) against (rows,), and a DataError where a metric
is not defined: no rows, NaN, a single class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from backprop_kernels.errors import DataError, ShapeError
from numpy.typing import ArrayLike, NDArray


def auc(y: ArrayLike, score: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """The probability that a row of class 1 scores above a row of class 0; a tie counts a half.

    `y` holds 0 and 1, `score` any numbers, `sample_weight` (rows,) non-negative ones. Exact without
    weights: pairs are counted in integers. O(n log n).
    """
    labels, scores = _pair("auc", y, score, "score")
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise DataError(f"auc: y: expected labels 0 and 1, got {np.unique(labels)[:5]}")
    # Twice the number of pairs, counting a tie as 1, stays below 2**63 up to 2**31 rows.
    weight: NDArray[np.int64] | NDArray[np.float64] = np.ones(labels.shape, np.int64)
    if sample_weight is not None:
        weight = _pair("auc", y, sample_weight, "sample_weight")[1]
        if weight.min() < 0:
            raise DataError(f"auc: sample_weight: expected no negative weight, got {weight.min()}")
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of each run of ties
    above = np.add.reduceat(np.where(positive, weight, 0)[order], starts)
    below = np.add.reduceat(np.where(positive, 0, weight)[order], starts)
    pairs = float(above.sum()) * float(below.sum())
    if pairs == 0:
        raise DataError("auc: y: expected rows of both classes with weight, got one class")
    beaten = 2 * (np.cumsum(below) - below) + below
    return float((above * beaten).sum()) / (2 * pairs)


def log_loss(y: ArrayLike, p: ArrayLike) -> float:
    """The mean of −log of the probability given to the true class.

    `y` holds class indices; `p` is the probability of class 1, (rows,), or of each class,
    (rows, classes). Probabilities are kept one rounding step away from 0 and 1.
    """
    labels = _finite("log_loss", "y", y)
    probabilities = _finite("log_loss", "p", p)
    _check_rows("log_loss", labels)
    if probabilities.ndim not in (1, 2) or len(probabilities) != len(labels):
        raise ShapeError(
            f"log_loss: p: expected shape ({len(labels)},) or ({len(labels)}, classes), "
            f"got {probabilities.shape}"
        )
    least, most = probabilities.min(), probabilities.max()
    if least < 0 or most > 1:
        raise DataError(f"log_loss: p: expected probabilities 0 to 1, got {least} to {most}")
    if probabilities.ndim == 1:
        probabilities = np.stack([1 - probabilities, probabilities], axis=1)
    classes = probabilities.shape[1]
    if not np.isin(labels, np.arange(classes)).all():
        raise DataError(f"log_loss: y: expected class indices 0 to {classes - 1}, got others")
    chosen = probabilities[np.arange(len(labels)), labels.astype(np.int64)]
    tiny = np.finfo(np.result_type(np.asarray(p), np.float32)).eps
    return float(-np.log(np.clip(chosen, tiny, 1 - tiny)).mean())


def accuracy(y: ArrayLike, predicted: ArrayLike) -> float:
    """The fraction of rows whose predicted label, a number or a string, is the true one."""
    labels, guesses = np.asarray(y), np.asarray(predicted)
    _check_same_shape("accuracy", labels, guesses, "predicted")
    return float((labels == guesses).mean())


def r2(y: ArrayLike, predicted: ArrayLike) -> float:
    """The fraction of y's variance explained; for a constant y, 1 if exact and 0 otherwise."""
    true, guesses = _pair("r2", y, predicted)
    if len(true) < 2:
        raise DataError("r2: y: expected at least 2 rows, got 1")
    residual = float(((true - guesses) ** 2).sum())
    if (true == true[0]).all():
        return float(residual == 0)
    return 1 - residual / float(((true - true.mean()) ** 2).sum())


def mae(y: ArrayLike, predicted: ArrayLike) -> float:
    """The mean absolute error."""
    true, guesses = _pair("mae", y, predicted)
    return float(np.abs(true - guesses).mean())


def rmse(y: ArrayLike, predicted: ArrayLike) -> float:
    """The square root of the mean squared error."""
    true, guesses = _pair("rmse", y, predicted)
    return float(np.sqrt(((true - guesses) ** 2).mean()))


def _pair(
    where: str, y: ArrayLike, other: ArrayLike, name: str = "predicted"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as finite float64 of one shape."""
    first, second = _finite(where, "y", y), _finite(where, name, other)
    _check_same_shape(where, first, second, name)
    return first, second


def _finite(where: str, name: str, values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all():
        raise DataError(f"{where}: {name}: expected finite numbers, got NaN or infinity")
    return numbers


def _check_same_shape(where: str, y: NDArray[Any], other: NDArray[Any], name: str) -> None:
    _check_rows(where, y)
    if other.shape != y.shape:
        raise ShapeError(f"{where}: {name}: expected the shape {y.shape} of y, got {other.shape}")


def _check_rows(where: str, y: NDArray[Any]) -> None:
    if y.ndim != 1:
        raise ShapeError(f"{where}: y: expected shape (rows,), got {y.shape}")
    if not len(y):
        raise DataError(f"{where}: y: expected at least one row, got none")
