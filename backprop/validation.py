"""The data a fit trains on and is judged by: named sets, a share held out, weights of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import BackpropError, DataError, KindError, OptionError

from backprop.batches import Rows
from backprop.evaluation import kind_of
from backprop.gradients import weights
from backprop.losses import Loss
from backprop.memory import HOST, Memory, expect_one_kind
from backprop.model import Sequential


@dataclass(frozen=True)
class DataSet:
    """X, target and (where rows have them) weights, as the kernels take them."""

    columns: Sequence[Array | Rows]

    def __len__(self) -> int:
        return len(self.columns[0])

    @classmethod
    def checked(
        cls, model: Sequential, loss: Loss, X: Any, y: Any, weight: Any, where: str
    ) -> DataSet:
        """The data set, or an error that names `where` it came from.

        Of data on the model's device X stays there; targets and weights are looked at by NumPy.
        """
        expect_one_kind(where, X=X, y=y, sample_weight=weight)
        X, memory = model.column(X, where), model.memory
        y, weight = memory.numpy(y), memory.numpy(weight)
        if len(X) == 0:
            raise DataError(f"{where}: X: expected at least one row, got shape {X.shape}")
        columns = [X, loss.column(y, len(X), model.out_features, model.dtype)]
        if weight is not None:
            columns.append(weights(weight, len(X), where, model.dtype))
        return cls(columns)

    def weighted(self, factor: Array) -> DataSet:
        """The same rows, their weights multiplied by `factor` (rows,)."""
        X, target, *rest = self.columns
        w = np.ascontiguousarray(factor * rest[0] if rest else factor, X.dtype)
        return DataSet([X, target, w])

    def split(
        self, fraction: float, loss: Loss, seed: int, memory: Memory = HOST
    ) -> tuple[DataSet, DataSet]:
        """(rest, a share drawn at random): of every class the same share, where there are classes.

        At least one row, and of a class of one row none, is drawn.
        """
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if not (number and 0 < fraction < 1):
            raise OptionError(
                f"fit: validation_fraction: expected a number in (0, 1), got {fraction!r}"
            )
        columns = [column for column in self.columns if not isinstance(column, Rows)]
        if len(columns) < len(self.columns):
            raise KindError(
                "fit: validation_fraction: expected arrays in memory, got rows that are read while "
                "training runs; hold some out yourself and pass eval_set"
            )
        if len(self) < 2:
            raise DataError("fit: validation_fraction: expected at least 2 rows to split, got 1")
        held = _drawn(fraction, _labels(columns[1], loss), np.random.default_rng(seed))
        rest, share = np.flatnonzero(~held), np.flatnonzero(held)
        return (
            DataSet([memory.rows(column, rest) for column in columns]),
            DataSet([memory.rows(column, share) for column in columns]),
        )


def _labels(target: Array, loss: Loss) -> Array:
    """One label a row to keep in proportion; a single one where targets are numbers."""
    if kind_of(loss) == "numbers" or (target.ndim == 2 and target.shape[1] > 1):
        return np.zeros(len(target), np.int64)
    return target.reshape(len(target))


def _drawn(fraction: float, labels: Array, rng: np.random.Generator) -> Array:
    """Which rows are held out, a mask. Every class gives its share, to a row."""
    classes, of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    total = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    share = fraction * counts
    take = np.floor(share).astype(np.int64)  # below counts: a share is below 1
    # What rounding down left goes to the classes that lost most by it.
    order = np.argsort(take - share, kind="stable")
    while take.sum() < total:
        room = [c for c in order if take[c] < counts[c] - 1] or [
            c for c in order if take[c] < counts[c]
        ]
        for c in room[: total - take.sum()]:
            take[c] += 1
    held = np.zeros(len(labels), bool)
    for c in range(len(classes)):
        held[rng.permutation(np.flatnonzero(of_row == c))[: take[c]]] = True
    return held


def named_sets(model: Sequential, loss: Loss, eval_set: Any) -> dict[str, DataSet]:
    """`eval_set` by name: (X, y) or (X, y, weight) is "val"; or a mapping of several."""
    if eval_set is None:
        return {}
    if not isinstance(eval_set, Mapping):
        eval_set = {"val": eval_set}
    found = {}
    for name, data in eval_set.items():
        where = "fit: eval_set" if name == "val" else f"fit: eval_set[{name!r}]"
        if not isinstance(name, str) or not name:
            raise KindError(f"{where}: expected names, got {name!r}")
        if not isinstance(data, tuple | list) or len(data) not in (2, 3):
            raise KindError(
                f"{where}: expected (X, y) or (X, y, sample_weight), got {type(data).__name__}"
            )
        weight = data[2] if len(data) == 3 else None
        try:
            found[name] = DataSet.checked(model, loss, data[0], data[1], weight, where)
        except BackpropError as problem:
            if str(problem).startswith(where):
                raise
            raise type(problem)(f"{where}: {problem}") from None
    return found


def class_weights(target: Array, class_weight: Any, loss: Loss, where: str) -> Array:
    """(rows,) weights of rows by their class.

    `class_weight` is "balanced" (rows / (classes · rows of the class)), or weights by class: a
    mapping, where others weigh 1, or a sequence in the order of the classes.
    """
    if (
        isinstance(target, Rows)
        or kind_of(loss) == "numbers"
        or (target.ndim == 2 and target.shape[1] > 1)
    ):
        raise OptionError(
            f"{where}: class_weight: expected targets that are one class a row, in memory; got "
            f"those of loss {loss.name}"
        )
    labels = target.reshape(len(target))
    counted = labels != loss.options.get("ignore_index", np.nan)
    classes, of_row = np.unique(labels, return_inverse=True)
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise OptionError(
                f'{where}: class_weight: expected "balanced" or weights by class, got '
                f"{class_weight!r}"
            )
        present, rows = np.unique(labels[counted], return_counts=True)
        by_class = dict(
            zip(present.tolist(), (rows.sum() / (len(rows) * rows)).tolist(), strict=True)
        )
    elif isinstance(class_weight, Mapping):
        by_class = dict(class_weight)
        unknown = set(by_class) - set(classes.tolist())
        if unknown:
            raise OptionError(
                f"{where}: class_weight: expected classes of y ({_listed(classes)}), got "
                f"{_listed(sorted(unknown, key=str))}"
            )
    else:
        values = list(class_weight)
        known = classes[classes != loss.options.get("ignore_index", np.nan)]
        expected = int(known.max()) + 1 if kind_of(loss) == "classes" else len(known)
        if len(values) < expected:
            raise OptionError(
                f"{where}: class_weight: expected {expected} weights, one a class, got "
                f"{len(values)}"
            )
        keys = range(len(values)) if kind_of(loss) == "classes" else known.tolist()
        by_class = dict(zip(keys, values, strict=False))
    return weights(
        np.array([by_class.get(c, 1.0) for c in classes.tolist()], np.float64)[of_row],
        len(labels), f"{where}: class_weight", np.float64,
    )  # fmt: skip


def _listed(values: Any) -> str:
    shown = [str(v) for v in list(values)[:8]]
    return ", ".join(shown + ["…"] * (len(values) > 8))
