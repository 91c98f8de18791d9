"""Reads a `Table` from a CSV, NPZ, NPY or Parquet file, or from a data frame.

A refused row (a stray value, the wrong number of fields, an infinity) is left out, kept with its
line and reason in `Table.refused`, and counted: too many of them are an error.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from backprop_kernels.errors import OptionError
from numpy.typing import NDArray

from backprop.table.delimited import read_csv
from backprop.table.frames import Columns, arrow_columns, frame_columns, is_frame
from backprop.table.table import (
    MAX_REFUSED,
    Kind,
    RefusedRow,
    Table,
    check_names,
    refuse_file,
    text_column,
)


def read_table(
    path: str | Path | Any,
    *,
    columns: Collection[str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    max_refused: float = MAX_REFUSED,
) -> Table:
    """Read the columns of a .csv, .tsv or .txt (also .gz or .zip), .npz, .npy or .parquet file.

    Args:
        path: the file, or a pandas DataFrame or an Arrow table. CSV needs a header row and UTF-8;
            its delimiter is the one of comma, semicolon and tab that splits the header most. NPZ
            holds `X` (rows, features) with
            optional `y` (rows,) and `columns` (features,), or one 1-D array for each column. NPY
            holds (rows, features), read as columns x0, x1, ….
        columns: the columns to keep, in the file's order; all of them unless given.
        kinds: "number" or "text" for some CSV columns, in place of the rule above. `Encoder.kinds`
            makes a later file read as the training file was.
        max_refused: the largest fraction of the rows that may be refused.

    Raises DataError for a file that is not a table or has too many refused rows, OptionError for an
    unknown suffix, kind or fraction, OSError when the file cannot be opened.
    """
    stored = frame_columns(path) if is_frame(path) else None
    path = Path(path if stored is None else type(path).__name__)
    kinds = kinds or {}
    for name, kind in kinds.items():
        if kind not in ("number", "text"):
            where = f"read_table: kinds[{name!r}]"
            raise OptionError(f"{where}: expected 'number' or 'text', got {kind!r}")
    if not 0 <= max_refused <= 1:
        raise OptionError(f"read_table: max_refused: expected 0 to 1, got {max_refused}")
    suffix = path.suffix.lower()
    if suffix in _BINARY:
        stored = _BINARY[suffix](path)
    refused: dict[int, RefusedRow] = {}
    if suffix in (".csv", ".tsv", ".txt", ".gz", ".zip"):
        table, refused = read_csv(path, suffix, columns, kinds)
    elif stored is not None:
        rows = len(next(iter(stored.values()), ()))
        kept = {name: stored[name] for name in stored if columns is None or name in columns}
        table = Table(str(path), kept, np.arange(1, rows + 1))
    else:
        raise OptionError(
            "read_table: path: expected a name ending in .csv, .tsv, .txt, .gz, .zip, .npz, .npy "
            f"or .parquet, got {path.name!r}"
        )
    lacking = sorted(set(columns or ()) - set(table.columns))
    if lacking:
        refuse_file(path, f"columns {', '.join(lacking)}", "none so named")
    if len(table) + len(table.refused) == 0:
        refuse_file(path, "at least one column and one row of data", "none")
    for name, values in table.columns.items():
        if values.dtype != object:
            for row in np.flatnonzero(np.isinf(values)).tolist():
                found = f"{values[row]:+}"
                stray = RefusedRow(table.place(row), name, "a finite number", found)
                refused.setdefault(row, stray)
    return table.without(refused, max_refused)


def _read_npy(path: Path) -> Columns:
    loaded = _loaded(path)
    if isinstance(loaded, dict):
        refuse_file(path, "a single array", "an archive (an .npz file)")
    return _matrix(path, "the array", loaded, None)


def _read_npz(path: Path) -> Columns:
    loaded = _loaded(path)
    if not isinstance(loaded, dict):
        refuse_file(path, "an archive of arrays", "a single array (an .npy file)")
    if "X" in loaded:
        extra = sorted(set(loaded) - {"X", "y", "columns"})
        if extra:
            refuse_file(path, "arrays X, y and columns", f"also {', '.join(extra)}")
        columns = _matrix(path, "X", loaded["X"], loaded.get("columns"))
        if "y" in columns:
            refuse_file(path, "names in `columns` other than 'y'", "'y'")
        if "y" in loaded:
            columns["y"] = _from_array(path, "y", loaded["y"])
    else:
        columns = {name: _from_array(path, name, values) for name, values in loaded.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        refuse_file(path, "columns of one length", str(lengths))
    return columns


def _loaded(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """The array of an .npy file, or the arrays of an .npz file; never a pickle."""
    with path.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
        except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as e:
            refuse_file(path, "a whole .npy or .npz file of plain arrays", str(e), e)


def _matrix(path: Path, what: str, X: NDArray[Any], names: NDArray[Any] | None) -> Columns:
    """The columns of a matrix, called x0, x1, … unless `names` calls them otherwise."""
    if X.ndim != 2:
        refuse_file(path, f"{what} of shape (rows, features)", f"shape {X.shape}")
    if names is None:
        names = np.array([f"x{j}" for j in range(X.shape[1])], str)
    if names.shape != X.shape[1:] or names.dtype.kind != "U":
        got = f"shape {names.shape} of {names.dtype}"
        refuse_file(path, f"`columns` of shape ({X.shape[1]},) holding strings", got)
    check_names(path, names.tolist())
    return {name: _from_array(path, name, X[:, j]) for j, name in enumerate(names.tolist())}


def _from_array(path: Path, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """A 1-D array as a column: booleans and numbers become float64, strings and dates text."""
    if values.ndim != 1:
        refuse_file(path, f"array {name} of shape (rows,)", f"shape {values.shape}")
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    if values.dtype.kind == "M":
        return text_column(
            None if value == "NaT" else value for value in values.astype(str).tolist()
        )
    if values.dtype.kind == "U":
        return text_column(values.tolist())
    refuse_file(path, f"numbers, strings or dates in array {name}", str(values.dtype))


def _read_parquet(path: Path) -> Columns:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        advice = 'pip install "fused-backprop[parquet]"'
        refuse_file(path, "pyarrow, which reads Parquet", f"no pyarrow; {advice}", error)
    with path.open("rb") as file:
        try:
            stored = parquet.read_table(file)
        except (arrow.ArrowException, OSError) as error:
            refuse_file(path, "a whole Parquet file", str(error), error)
    return arrow_columns(path, stored)


_BINARY: dict[str, Callable[[Path], Columns]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".parquet": _read_parquet,
}
