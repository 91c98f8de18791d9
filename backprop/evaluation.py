"""Loss and metrics of a model on a data set, in batches.

THE metric table. A metric adds up a few numbers over batches and makes its value of the sums, so
that no set of predictions need fit in memory; only the AUC keeps one score a row. Definitions are
scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from backprop_kernels import checks
from backprop_kernels.activations import sigmoid
from backprop_kernels.arrays import Array
from backprop_kernels.errors import DataError, KindError, OptionError
from backprop_kernels.losses import LOSSES
from backprop_kernels.reference import array_math

from backprop.batches import Rows
from backprop.losses import Loss, options_for_kernel, resolve_loss
from backprop.metrics import auc
from backprop.model import PREDICT_ROWS, Sequential

KINDS = {"classes": "classes", "probability": "binary", "binary": "binary", "sign": "binary"}
Sums: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Metric:
    """`add(y, P, w)` makes the sums of a batch, `value(*sums)` the metric.

    For classes y is ids (rows,) and P probabilities (rows, classes); for binary outputs y is 0 or 1
    and P the probability of 1; else y is numbers and P predictions: all (rows, outputs). w is
    (rows, 1).
    """

    better: str  # "min" or "max"
    kinds: tuple[str, ...]  # of targets: classes, binary, numbers
    add: Callable[[Array, Array, Array], Sums]
    value: Callable[..., float]


def _hits(y: Array, P: Array) -> tuple[Array, Array, Array]:
    """(true, predicted, counted) as (rows, classes): what F1 counts."""
    if y.ndim == 1:
        classes = np.arange(P.shape[1])
        return y[:, None] == classes, P.argmax(axis=1)[:, None] == classes, classes
    return y > 0.5, P > 0.5, np.arange(P.shape[1])


def _right(y: Array, P: Array, w: Array) -> Sums:
    same = (P.argmax(axis=1) == y)[:, None] if y.ndim == 1 else (P > 0.5) == (y > 0.5)
    return (w * same).sum(), same.shape[1] * w.sum()


def _log_loss(y: Array, P: Array, w: Array) -> Sums:
    tiny = np.finfo(P.dtype).eps
    P = np.clip(P, tiny, 1 - tiny)
    if y.ndim == 1:
        return (w[:, 0] * -np.log(P[np.arange(len(y)), y])).sum(), w.sum()
    return (w * -np.log(np.where(y > 0.5, P, 1 - P))).sum(), P.shape[1] * w.sum()


def _f1_sums(y: Array, P: Array, w: Array) -> Sums:
    true, predicted, _ = _hits(y, P)
    both = true & predicted
    return tuple((w * counted).sum(axis=0) for counted in (both, true, predicted))


def _f1(both: Array, true: Array, predicted: Array) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.where(true + predicted > 0, 2 * both / (true + predicted), 0.0).mean())


def _auc(y: Sequence[Array], P: Sequence[Array], w: Sequence[Array]) -> float:
    labels, scores, weight = np.concatenate(y), np.concatenate(P), np.concatenate(w)[:, 0]
    if labels.ndim == 1:  # one class against the others, averaged
        labels = labels[:, None] == np.arange(scores.shape[1])
    weighted = None if (weight == 1).all() else weight
    values = [auc(labels[:, c], scores[:, c], weighted) for c in range(scores.shape[1])]
    return float(np.mean(values))


def _r2_sums(y: Array, P: Array, w: Array) -> Sums:
    # Moments about the mean of this batch: squares of large numbers would cancel.
    total = w.sum()
    mean = (w * y).sum(axis=0) / total
    within = (w * (y - mean) ** 2).sum(axis=0)
    return [((y - P) ** 2 * w).sum(axis=0)], [total], [mean], [within]


def _r2(residual: list[Array], total: list[float], mean: list[Array], within: list[Array]) -> float:
    means, weight = np.array(mean), np.array(total)[:, None]
    centre = (weight * means).sum(axis=0) / weight.sum()
    spread = np.sum(within, axis=0) + (weight * (means - centre) ** 2).sum(axis=0)
    left = np.sum(residual, axis=0)
    safe = np.where(spread > 0, spread, 1)
    return float(np.where(spread > 0, 1 - left / safe, left == 0).mean())


CLASSES, NUMBERS = ("classes", "binary"), ("numbers",)
METRICS: dict[str, Metric] = {
    "accuracy": Metric("max", CLASSES, _right, lambda right, total: float(right / total)),
    "auc": Metric("max", CLASSES, lambda y, P, w: ([y], [P], [w]), _auc),
    "log_loss": Metric("min", CLASSES, _log_loss, lambda loss, total: float(loss / total)),
    "f1": Metric("max", CLASSES, _f1_sums, _f1),
    "mae": Metric(
        "min", NUMBERS,
        lambda y, P, w: ((w * np.abs(y - P)).sum(axis=0), w.sum()),
        lambda error, total: float((error / total).mean()),
    ),
    "rmse": Metric(
        "min", NUMBERS,
        lambda y, P, w: ((w * (y - P) ** 2).sum(axis=0), w.sum()),
        lambda error, total: float(np.sqrt(error / total).mean()),
    ),
    "r2": Metric("max", NUMBERS, _r2_sums, _r2),
}  # fmt: skip

CustomMetric: TypeAlias = Callable[[Array, Array], float]


def resolve_metrics(
    metrics: Sequence[str | CustomMetric] | str, loss: Loss, where: str
) -> dict[str, str | CustomMetric]:
    """By name; each a row of `METRICS` that fits the loss, or a function of (y, predictions)."""
    found: dict[str, str | CustomMetric] = {}
    for metric in [metrics] if isinstance(metrics, str) else metrics:
        if isinstance(metric, str):
            checks.choice(where, "metrics", metric, METRICS)
            kind = kind_of(loss)
            if kind not in METRICS[metric].kinds:
                fitting = [name for name, row in METRICS.items() if kind in row.kinds]
                raise OptionError(
                    f"{where}: metrics: expected one of {', '.join(fitting)} with loss {loss.name}"
                    f"; got {metric!r}"
                )
            found[metric] = metric
        elif callable(metric):
            found[getattr(metric, "__name__", type(metric).__name__)] = metric
        else:
            raise KindError(
                f"{where}: metrics: expected names or functions of (y, predictions), got "
                f"{type(metric).__name__}"
            )
    return found


def kind_of(loss: Loss) -> str:
    """What this loss predicts: classes, binary or numbers."""
    return KINDS.get(LOSSES[loss.name].targets, "numbers")


def evaluate(
    model: Sequential,
    X: Any,
    y: Any,
    loss: str | Loss = "mse",
    metrics: Sequence[str | CustomMetric] | str = (),
    sample_weight: Any = None,
) -> dict[str, float]:
    """{"loss": …, metric: …} of `model` on (X, y), in prediction mode, a batch at a time.

    A function among `metrics` is called with y and the predictions of all rows, both as in
    `Metric`, and listed by its name.
    """
    from backprop.validation import DataSet

    loss = resolve_loss(loss)
    data = DataSet.checked(model, loss, X, y, sample_weight, "evaluate")
    return scores(model, loss, data.columns, resolve_metrics(metrics, loss, "evaluate"))


def scores(
    model: Sequential,
    loss: Loss,
    columns: Sequence[Array | Rows],
    metrics: Mapping[str, str | CustomMetric],
    precision: str | None = None,
) -> dict[str, float]:
    """`evaluate` on checked columns: X, target[, weight]."""
    options = options_for_kernel(loss, model.out_features)
    total = mass = 0.0
    sums: dict[str, Sums] = {}
    kept: list[tuple[Array, Array]] = []
    custom = [name for name, metric in metrics.items() if callable(metric)]

    def lost(Z: Array, part: list[Array]) -> tuple[Array, float, Array, Array | None]:
        """(Z, its loss, target, weight)."""
        _, target, *rest = part
        weight, place = rest[0] if rest else None, model.memory.place
        placed = None if weight is None else place(weight)
        value, *_ = model.backend.loss(
            Z, place(target), loss.name, options, sample_weight=placed
        )  # fmt: skip
        return Z, float(value), target, weight

    for Z, value, target, weight in model.outputs(
        columns, lost, PREDICT_ROWS, precision, "evaluate"
    ):
        counted = loss.mass(target, weight)
        total += counted * value
        mass += counted
        if not metrics:
            continue
        y, P, w = _predictions(loss, model.memory.numpy(Z), target, weight)
        if not len(y):
            continue
        for name, metric in metrics.items():
            if isinstance(metric, str):
                part = METRICS[metric].add(y, P, w)
                before = sums.get(name)
                sums[name] = part if before is None else _added(before, part)
        if custom:
            kept.append((y.copy(), P.copy()))
    found = {"loss": total / mass if mass else 0.0}
    for name, metric in metrics.items():
        if isinstance(metric, str):
            if name not in sums:
                raise DataError(f"evaluate: {name}: expected at least one row that counts")
            found[name] = METRICS[metric].value(*sums[name])
        else:
            parts = zip(*kept, strict=True)
            found[name] = float(metric(*(np.concatenate(part) for part in parts)))
    return found


def _added(before: Sums, part: Sums) -> Sums:
    """Numbers and arrays add up; lists get longer."""
    return tuple(a + b for a, b in zip(before, part, strict=True))


def _predictions(
    loss: Loss, Z: Array, target: Array, weight: Array | None
) -> tuple[Array, Array, Array]:
    """(y, P, w) as `Metric` takes them, in float64; rows that the loss ignores are left out."""
    Z, kind = Z.astype(np.float64), kind_of(loss)
    w = np.ones((len(Z), 1)) if weight is None else weight.astype(np.float64)[:, None]
    if kind == "classes":
        y = target
        if target.ndim == 2:
            y = target.argmax(axis=1)
        elif (keep := target != loss.options["ignore_index"]).sum() < len(target):
            y, Z, w = y[keep], Z[keep], w[keep]
        E = np.exp(Z - Z.max(axis=1, keepdims=True))
        return y, E / E.sum(axis=1, keepdims=True), w
    y = target.astype(np.float64)
    if kind == "binary":
        with np.errstate(under="ignore"):
            P = sigmoid(array_math, Z)
        return (y > 0).astype(np.float64) if loss.name == "hinge" else y, P, w
    if loss.name == "poisson":
        return y, np.exp(Z), w
    return y, Z[:, : y.shape[1]], w  # gaussian_nll: the means
