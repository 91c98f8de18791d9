"""What an encoder learns, and its JSON form: written plainly, read with suspicion.

A model file may come from anywhere, so `from_dict` accepts exactly what `to_dict` writes: the same
keys, finite numbers, sorted and distinct names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NoReturn

from backprop_kernels.errors import CheckpointFormatError

from backprop.table.delimited import parse_number
from backprop.table.table import Kind, shown

Task = Literal["binary", "multiclass", "regression"]
TASKS = ("binary", "multiclass", "regression")
MAX_CATEGORIES = 256


@dataclass(frozen=True)
class NumberColumn:
    """(value or median − mean) / scale; a scale of 0 marks a constant column, which becomes 0."""

    name: str
    median: float
    mean: float
    scale: float

    kind: ClassVar[Kind] = "number"

    @property
    def features(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def note(self) -> str | None:
        return "at most one value in training, encoded as 0" if self.scale == 0 else None


@dataclass(frozen=True)
class TextColumn:
    """One 0/1 column for each category, sorted; a missing or unknown one gives zeros."""

    name: str
    categories: tuple[str, ...]

    kind: ClassVar[Kind] = "text"

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(f"{self.name}={category}" for category in self.categories)

    @property
    def note(self) -> str | None:
        if not self.categories:
            return "no value in training, not encoded"
        texts = [category for category in self.categories if parse_number(category) is None]
        if not 0 < 2 * len(texts) <= len(self.categories):
            return None
        return (
            f"text because of {shown(texts[0])}, though most categories are numbers; "
            f"kinds={{{self.name!r}: 'number'}} refuses the rows that are not"
        )


@dataclass(frozen=True)
class Target:
    """What is predicted: `classes` in label order, or the mean and scale of a regression target."""

    name: str
    task: Task
    classes: tuple[str, ...] | tuple[int, ...] = ()
    mean: float = 0.0
    scale: float = 1.0


def class_count(task: Task) -> str:
    """How many classes a classification may have, in words."""
    return "2 classes" if task == "binary" else f"2 to {MAX_CATEGORIES} classes"


def to_dict(columns: Sequence[NumberColumn | TextColumn], target: Target) -> dict[str, Any]:
    """The JSON form of an encoder's columns and target."""
    if target.task == "regression":
        learned: dict[str, Any] = {"mean": target.mean, "scale": target.scale}
    else:
        learned = {"classes": list(target.classes)}
    return {
        "columns": [
            {"name": column.name, "categories": list(column.categories)}
            if isinstance(column, TextColumn)
            else asdict(column)
            for column in columns
        ],
        "target": {"name": target.name, "task": target.task, **learned},
    }


def from_dict(stored: object) -> tuple[tuple[NumberColumn | TextColumn, ...], Target]:
    """The columns and target of an encoder; raises CheckpointFormatError."""
    fields = _object("encoder", stored, {"columns", "target"})
    items = fields["columns"]
    if not isinstance(items, list) or not items:
        _refuse("columns", "a list of at least one column", items)
    columns = tuple(_column(f"columns[{i}]", item) for i, item in enumerate(items))
    target = _target(fields["target"])
    names = [target.name, *(column.name for column in columns)]
    if len(set(names)) < len(names):
        _refuse("columns", "distinct names, none of them the target's", names)
    return columns, target


def _column(where: str, stored: object) -> NumberColumn | TextColumn:
    if isinstance(stored, dict) and "categories" in stored:
        fields = _object(where, stored, {"name", "categories"})
        name = _name(f"{where}.name", fields["name"])
        categories = fields["categories"]
        if not _sorted_distinct(categories, str) or len(categories) > MAX_CATEGORIES:
            expected = f"at most {MAX_CATEGORIES} sorted, distinct strings"
            _refuse(f"{where}.categories", expected, categories)
        return TextColumn(name, tuple(categories))
    fields = _object(where, stored, {"name", "median", "mean", "scale"})
    name = _name(f"{where}.name", fields["name"])
    median, mean = (_number(f"{where}.{key}", fields[key]) for key in ("median", "mean"))
    scale = _number(f"{where}.scale", fields["scale"])
    if scale < 0:
        _refuse(f"{where}.scale", "a number that is not negative", scale)
    return NumberColumn(name, median, mean, scale)


def _target(stored: object) -> Target:
    task = stored.get("task") if isinstance(stored, dict) else None
    if task not in TASKS:
        _refuse("target.task", f"one of {', '.join(TASKS)}", task)
    rest = {"mean", "scale"} if task == "regression" else {"classes"}
    fields = _object("target", stored, {"name", "task"} | rest)
    name = _name("target.name", fields["name"])
    if task == "regression":
        mean = _number("target.mean", fields["mean"])
        scale = _number("target.scale", fields["scale"])
        if scale <= 0:
            _refuse("target.scale", "a positive number", scale)
        return Target(name, task, (), mean, scale)
    classes = fields["classes"]
    if not (_sorted_distinct(classes, str) or _sorted_distinct(classes, int)):
        _refuse("target.classes", "a sorted list of distinct strings or integers", classes)
    if len(classes) < 2 or len(classes) > (2 if task == "binary" else MAX_CATEGORIES):
        _refuse("target.classes", class_count(task), classes)
    return Target(name, task, tuple(classes))


def _object(where: str, stored: object, keys: set[str]) -> dict[str, Any]:
    if not isinstance(stored, dict) or set(stored) != keys:
        got = list(stored) if isinstance(stored, dict) else stored
        _refuse(where, f"an object with the keys {', '.join(sorted(keys))}", got)
    return stored


def _name(where: str, stored: object) -> str:
    if not isinstance(stored, str) or not stored:
        _refuse(where, "a name", stored)
    return stored


def _number(where: str, stored: object) -> float:
    # bool is an int to Python; an int beyond float64 makes float() raise OverflowError.
    if isinstance(stored, (int, float)) and not isinstance(stored, bool):
        try:
            number = float(stored)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    _refuse(where, "a finite number", stored)


def _sorted_distinct(stored: object, kind: type) -> bool:
    if not isinstance(stored, list) or any(type(item) is not kind for item in stored):
        return False
    return all(a < b for a, b in itertools.pairwise(stored))


def _refuse(where: str, expected: str, got: object) -> NoReturn:
    raise CheckpointFormatError(
        f"Encoder.from_dict: {where}: expected {expected}, got {shown(got)}; "
        "the model file is damaged or of another version"
    )
