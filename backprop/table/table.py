"""A table: named columns of equal length that remember which line of the file each row came from.

A number column is float64 with NaN where a value is missing; a text column is an object array of
`str` and None. `files.read_table` reads one, `encoder.Encoder` makes X and y of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from backprop_kernels.errors import DataError, KindError, ShapeError
from numpy.typing import NDArray

Kind = Literal["number", "text"]

MISSING = frozenset({"", "NA", "NaN", "nan", "null", "None"})
MAX_REFUSED = 0.01


@dataclass(frozen=True)
class RefusedRow:
    """A row left out of a table: where it stood and why."""

    place: str
    """`line 12` of a text file, `row 12` of a binary one; both count from 1."""
    column: str | None
    """None when the whole row is at fault."""
    expected: str
    found: str

    def __str__(self) -> str:
        where = self.place if self.column is None else f"{self.place}: column {self.column}"
        return f"{where}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of equal length, and where each row came from.

    `columns` maps names to arrays of shape (rows,). `line_numbers` (rows,) int64 counts from 1:
    lines of a text file, of which the header is one, or rows of a binary one. `refused` lists the
    rows left out. Raises ShapeError when the lengths differ, KindError for another dtype.
    """

    path: str
    columns: dict[str, NDArray[Any]]
    line_numbers: NDArray[np.int64]
    unit: Literal["line", "row"] = "row"
    refused: tuple[RefusedRow, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if values.dtype not in (np.float64, object):
                expected = "dtype float64 or object (text)"
                raise KindError(
                    f"Table: columns[{name!r}]: expected {expected}, got {values.dtype}"
                )
            if values.shape != self.line_numbers.shape:
                raise ShapeError(
                    f"Table: columns[{name!r}]: expected shape {self.line_numbers.shape}, "
                    f"one value for each line number, got {values.shape}"
                )

    def __len__(self) -> int:
        return len(self.line_numbers)

    def place(self, row: int) -> str:
        """Where row `row` of this table stood in its file, such as `line 12`."""
        return f"{self.unit} {self.line_numbers[row]}"

    def take(self, rows: NDArray[np.integer | np.bool_]) -> Table:
        """The table of the given rows: indices in any order, or a boolean mask."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, line_numbers=self.line_numbers[rows])

    def require(self, name: str, max_refused: float = MAX_REFUSED) -> Table:
        """The table without the rows that lack a value in column `name`, which join `refused`.

        Raises DataError when there is no such column or too many rows are refused.
        """
        if name not in self.columns:
            names = ", ".join(self.columns)
            raise DataError(f"{self.path}: expected a column {name!r}, got columns {names}")
        lacking = np.flatnonzero(is_missing(self.columns[name])).tolist()
        refused = {row: RefusedRow(self.place(row), name, "a value", "none") for row in lacking}
        return self.without(refused, max_refused)

    def without(self, refused: Mapping[int, RefusedRow], max_refused: float) -> Table:
        """The table less the given rows (index: reason), which join `refused`.

        Raises DataError when more than the fraction `max_refused` of all rows is then refused, or
        no row is left.
        """
        keep = np.ones(len(self), bool)
        keep[list(refused)] = False
        reasons = self.refused + tuple(refused[row] for row in sorted(refused))
        rows = len(self) + len(self.refused)
        if len(reasons) > max_refused * rows or not keep.any():
            listed = "".join(f"\n  {reason}" for reason in reasons[:5])
            more = "\n  …" if len(reasons) > 5 else ""
            raise DataError(
                f"{self.path}: expected at most {max_refused:.2%} of the rows refused and some "
                f"left, got {len(reasons)} of {rows} refused:{listed}{more}\n"
                "mend these rows, or give them up with a larger max_refused (--max-refused)"
            )
        return replace(self.take(keep), refused=reasons)


def is_missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """True where a column, of numbers or of text, has no value."""
    if values.dtype == object:
        return np.array([value is None for value in values], bool)
    return np.asarray(np.isnan(values))


def text_column(values: Iterable[str | None]) -> NDArray[Any]:
    """An object column of the given text, with None for what is missing."""
    cells = [None if value is None or value.strip() in MISSING else value for value in values]
    return np.array(cells, object)


def shown(value: object) -> str:
    """A value as an error message quotes it, cut to a readable length."""
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else text[:59] + "…"


def refuse_file(
    path: Path, expected: str, found: str, cause: BaseException | None = None
) -> NoReturn:
    """Raise the DataError of a file that is not a table."""
    raise DataError(f"{path}: expected {expected}, got {found}") from cause


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse a file whose column names are empty or not distinct."""
    if "" in names:
        refuse_file(
            path,
            "a name for every column",
            f"none for column {names.index('') + 1} (with pandas, to_csv(index=False) omits it)",
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        refuse_file(path, "distinct column names", f"repeated {', '.join(repeated)}")
