"""Turns the rows of a table into X and y, as learned from the training rows alone.

Number columns have their gaps filled with the median and are standardised; text columns become one
0/1 column for each category. An `Encoder` is a few numbers and names, so it travels inside a model
file and prediction can start from raw rows (`encoding.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, NoReturn, Self

import numpy as np
from backprop_kernels.errors import DataError, LabelError, OptionError
from numpy.typing import ArrayLike, NDArray

from backprop.table.encoding import (
    MAX_CATEGORIES,
    TASKS,
    NumberColumn,
    Target,
    Task,
    TextColumn,
    class_count,
    from_dict,
    to_dict,
)
from backprop.table.table import Kind, Table, is_missing, shown

# A number column with more distinct values than this, or with fractions, is a quantity to predict.
MAX_INTEGER_CLASSES = 20

_DATE = r"\d{4}-\d{2}-\d{2}"
_TIME = r"\d{2}:\d{2}(:\d{2}([.,]\d+)?)?(Z|[+-]\d{2}:?\d{2})?"
_ISO_TIME = re.compile(f"{_DATE}([T ]{_TIME})?|{_TIME}")


@dataclass(frozen=True)
class Encoder:
    """Encodes tables for a network: `columns` make X, `target` makes y."""

    columns: tuple[NumberColumn | TextColumn, ...]
    target: Target

    @classmethod
    def fit(
        cls,
        table: Table,
        *,
        target: str,
        drop: Collection[str] = (),
        task: Task | Literal["auto"] = "auto",
    ) -> Self:
        """Learn the encoding from training rows.

        Args:
            table: the training rows, every one with a target (see `Table.require`).
            target: the column to predict.
            drop: columns to leave out.
            task: "auto" takes text and at most 20 distinct integers as classes (two: binary) and
                other numbers as regression.

        Raises DataError when the target or a column cannot be encoded, OptionError for an unknown
        task or an unknown name in `drop`.
        """
        unknown = sorted({target, *drop} - set(table.columns))
        if unknown or target in drop:
            got = ", ".join(unknown) or f"{target}, which is the target"
            where = "target" if target in unknown else "drop"
            names = ", ".join(table.columns)
            raise OptionError(f"Encoder.fit: {where}: expected columns of {names}; got {got}")
        fitted_target = _fit_target(table, target, task)
        columns: list[NumberColumn | TextColumn] = []
        faults: dict[str, str] = {}
        for name, values in table.columns.items():
            if name == target or name in drop:
                continue
            if values.dtype != object:
                columns.append(_fit_number(name, values))
                continue
            categories = tuple(sorted({value for value in values if value is not None}))
            fault = _text_fault(categories)
            if fault:
                faults[name] = fault
            columns.append(TextColumn(name, categories))
        if faults:
            listed = "".join(f"\n  {name}: {fault}" for name, fault in faults.items())
            advice = " ".join(f"--drop {name}" for name in faults)
            raise DataError(
                f"{table.path}: expected columns of numbers or categories, got:{listed}"
                f"\nleave them out (drop=[…], or {advice}), or turn them into numbers first"
            )
        if not columns:
            raise DataError(f"{table.path}: expected a column besides the target, got none")
        return cls(tuple(columns), fitted_target)

    @property
    def task(self) -> Task:
        return self.target.task

    @property
    def classes(self) -> tuple[str, ...] | tuple[int, ...]:
        """The labels that stand for classes 0, 1, …; empty for regression."""
        return self.target.classes

    @property
    def outputs(self) -> int:
        """How many outputs a network for this target has: one, or one for each of many classes."""
        return len(self.classes) if self.task == "multiclass" else 1

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The columns of X: `age` for a number, `city=Rome` for a category."""
        return tuple(name for column in self.columns for name in column.features)

    @property
    def kinds(self) -> dict[str, Kind]:
        """How each column is to be read: pass it to `read_table` for rows to predict."""
        kinds: dict[str, Kind] = {column.name: column.kind for column in self.columns}
        text_target = bool(self.classes) and isinstance(self.classes[0], str)
        kinds[self.target.name] = "text" if text_target else "number"
        return kinds

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: columns that carry nothing or look misread."""
        return tuple(f"{column.name}: {column.note}" for column in self.columns if column.note)

    def transform(self, table: Table) -> NDArray[np.float32]:
        """X (rows, features), float32, C order; columns that the encoder does not know are ignored.

        Raises DataError when a column is lacking, is of the other kind or too large for float32.
        """
        lacking = [column.name for column in self.columns if column.name not in table.columns]
        if lacking:
            raise DataError(
                f"{table.path}: expected the columns of the training file, "
                f"got {', '.join(table.columns)}; lacking: {', '.join(lacking)}"
            )
        X = np.zeros((len(table), len(self.feature_names)), np.float32)
        start = 0
        for column in self.columns:
            if isinstance(column, NumberColumn):
                X[:, start] = _standardised(table, column)
                start += 1
            else:
                codes = _codes(_values(table, column.name, "text"), column.categories)
                known = np.flatnonzero(codes >= 0)
                X[known, start + codes[known]] = 1
                start += len(column.categories)
        return X

    def encode_target(self, table: Table) -> NDArray[np.float32] | NDArray[np.int64]:
        """y (rows,): float32 of 0 and 1 (binary) or standardised (regression), int64 (multiclass).

        Raises DataError when a row has no target, or a label that no training row had.
        """
        name = self.target.name
        if name not in table.columns:
            names = ", ".join(table.columns)
            raise DataError(f"{table.path}: expected a target column {name!r}, got columns {names}")
        values = _values(table, name, self.kinds[name])
        _refuse_missing(table, name)
        if self.task == "regression":
            return ((values - self.target.mean) / self.target.scale).astype(np.float32)
        codes = _codes(values, self.classes)
        if codes.min(initial=0) < 0:
            row = int(np.argmin(codes))
            raise DataError(
                f"{table.path}: {table.place(row)}: column {name}: expected a class of the "
                f"training rows ({shown(list(self.classes))}), got {shown(values[row])}"
            )
        return codes.astype(np.float32) if self.task == "binary" else codes

    def decode_target(self, values: ArrayLike) -> NDArray[Any]:
        """The inverse of `encode_target`: class indices to labels, or outputs to the target's unit.

        Raises LabelError for an index that is no class.
        """
        encoded = np.asarray(values)
        if self.task == "regression":
            return encoded.astype(np.float64) * self.target.scale + self.target.mean
        if not np.isin(encoded, np.arange(len(self.classes))).all():
            last = len(self.classes) - 1
            raise LabelError(
                f"Encoder.decode_target: values: expected class indices 0 to {last}, "
                f"got {shown(encoded)}"
            )
        return np.array(self.classes)[encoded.astype(np.intp)]

    def to_dict(self) -> dict[str, Any]:
        """The encoder as JSON can hold it."""
        return to_dict(self.columns, self.target)

    @classmethod
    def from_dict(cls, stored: object) -> Self:
        """The encoder that `to_dict` described; CheckpointFormatError for anything else."""
        return cls(*from_dict(stored))


def _fit_target(table: Table, name: str, task: Task | Literal["auto"]) -> Target:
    """The target's task, inferred when "auto", and its classes or scale."""
    if task not in ("auto", *TASKS):
        expected = ", ".join(("auto", *TASKS))
        raise OptionError(f"Encoder.fit: task: expected one of {expected}, got {task!r}")
    _refuse_missing(table, name)
    values = table.columns[name]
    text = values.dtype == object
    distinct: list[Any] = sorted(set(values.tolist()))
    integers = not text and all(value.is_integer() for value in distinct)
    if task == "auto" and (text or (integers and len(distinct) <= MAX_INTEGER_CLASSES)):
        task = "binary" if len(distinct) == 2 else "multiclass"
    elif task == "auto":
        task = "regression"

    def refuse(expected: str) -> NoReturn:
        got = f"{len(distinct)} distinct {'texts' if text else 'numbers'}: {shown(distinct)}"
        raise DataError(f"{table.path}: target {name}: expected {expected} for {task}, got {got}")

    if task == "regression":
        if text:
            refuse("numbers")
        fitted = _fit_number(name, values)
        if fitted.scale == 0:
            refuse("numbers that differ")
        return Target(name, task, (), fitted.mean, fitted.scale)
    if not (text or integers):
        refuse("texts or integers as classes")
    if len(distinct) < 2 or len(distinct) > (2 if task == "binary" else MAX_CATEGORIES):
        refuse(class_count(task))
    return Target(name, task, tuple(distinct if text else map(int, distinct)))


def _fit_number(name: str, values: NDArray[np.float64]) -> NumberColumn:
    """The median of the values present, and mean and standard deviation after filling the gaps."""
    present = values[~np.isnan(values)]
    if not present.size or present.min() == present.max():
        # Not left to the standard deviation: rounding makes that of 0.1, 0.1, … not quite 0.
        constant = float(present[0]) if present.size else 0.0
        return NumberColumn(name, constant, constant, 0.0)
    median = float(np.median(present))
    filled = np.where(np.isnan(values), median, values)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, scale = float(filled.mean()), float(filled.std())
    if not (np.isfinite([median, mean, scale]).all() and scale > 0):
        least, most = present.min(), present.max()
        raise DataError(
            f"Encoder.fit: column {name}: expected numbers whose variance float64 can hold, "
            f"got {least} to {most}; rescale them, or leave them out with --drop {name}"
        )
    return NumberColumn(name, median, mean, scale)


def _text_fault(categories: Sequence[str]) -> str | None:
    """Why a text column has no one-hot encoding, or None when it has one."""
    if categories and all(_ISO_TIME.fullmatch(category) for category in categories):
        return f"dates or times, such as {shown(categories[0])}"
    if len(categories) > MAX_CATEGORIES:
        return f"{len(categories)} distinct texts, such as {shown(categories[0])}"
    return None


def _values(table: Table, name: str, kind: Kind) -> NDArray[Any]:
    """A column of the kind that the encoder learned; one without any value may be of either."""
    values = table.columns[name]
    if (values.dtype == object) == (kind == "text"):
        return values
    missing = is_missing(values)
    if missing.all():
        return np.full(len(table), None if kind == "text" else np.nan)
    row = int(np.argmin(missing))
    raise DataError(
        f"{table.path}: {table.place(row)}: column {name}: expected {kind} as in the training "
        f"file, got {shown(values[row])}; read the file with kinds=encoder.kinds"
    )


def _standardised(table: Table, column: NumberColumn) -> NDArray[np.float32]:
    """A number column as it goes into X."""
    values = _values(table, column.name, "number")
    if column.scale == 0:
        return np.zeros(len(table), np.float32)
    filled = np.where(np.isnan(values), column.median, values)
    with np.errstate(over="ignore"):
        scaled = ((filled - column.mean) / column.scale).astype(np.float32)
    finite = np.isfinite(scaled)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataError(
            f"{table.path}: {table.place(row)}: column {column.name}: expected a number near the "
            f"training rows' (mean {column.mean:g}, deviation {column.scale:g}), got {values[row]}"
        )
    return scaled


def _codes(values: NDArray[Any], classes: Sequence[str] | Sequence[int]) -> NDArray[np.int64]:
    """The index of each value among the classes, −1 where it is none of them."""
    index = {value: code for code, value in enumerate(classes)}
    return np.fromiter(map(index.get, values.tolist(), repeat(-1)), np.int64, len(values))


def _refuse_missing(table: Table, target: str) -> None:
    missing = np.flatnonzero(is_missing(table.columns[target])).tolist()
    if missing:
        places = ", ".join(table.place(row) for row in missing[:5])
        more = ", …" if len(missing) > 5 else ""
        raise DataError(
            f"{table.path}: column {target}: expected a value in every row, got {len(missing)} "
            f"without ({places}{more}); leave these rows out with table.require({target!r})"
        )
