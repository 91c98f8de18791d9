"""Columns of data frames: pandas, Arrow, and what Parquet files hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backprop.table.table import check_names, refuse_file, text_column

Columns = dict[str, NDArray[Any]]


def is_frame(source: Any) -> bool:
    """Whether this is a pandas DataFrame or an Arrow table."""
    return _is("pandas", "DataFrame", source) or _is_arrow(source)


def frame_columns(frame: Any) -> Columns:
    """The columns of a pandas DataFrame or an Arrow table."""
    return arrow_columns(Path("Table"), frame) if _is_arrow(frame) else _pandas_columns(frame)


def _is_arrow(source: Any) -> bool:
    return _is("pyarrow", "Table", source) or _is("pyarrow", "RecordBatch", source)


def _is(library: str, kind: str, source: Any) -> bool:
    # Whoever has one has imported its library: none is imported here to find out.
    module = sys.modules.get(library)
    return module is not None and isinstance(source, getattr(module, kind))


def _pandas_columns(frame: Any) -> Columns:
    path = Path("DataFrame")
    names = [str(name) for name in frame.columns]
    check_names(path, names)
    columns: Columns = {}
    for position, name in enumerate(names):
        column = frame.iloc[:, position]
        if column.dtype.kind in "biuf":
            columns[name] = column.to_numpy(np.float64, na_value=np.nan)
            continue
        cells = column.astype(str if column.dtype.kind == "M" else object)
        values = [None if lacks else v for v, lacks in zip(cells, column.isna(), strict=True)]
        kinds = {type(value) for value in values if value is not None}
        if kinds and kinds <= {bool, int, float}:
            columns[name] = np.array([np.nan if v is None else v for v in values], np.float64)
        elif kinds <= {str}:
            columns[name] = text_column(values)
        else:
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            refuse_file(path, f"numbers, strings or dates in column {name}", found)
    return columns


def arrow_columns(path: Path, stored: Any) -> Columns:
    """The columns of an Arrow table; `path` is where it came from."""
    import pyarrow as arrow
    from pyarrow import types

    check_names(path, stored.schema.names)
    numbers = (
        types.is_boolean,
        types.is_integer,
        types.is_floating,
        types.is_decimal,
        types.is_null,
    )
    texts = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_date,
        types.is_timestamp,
        types.is_time,
    )
    columns: Columns = {}
    for name, column in zip(stored.schema.names, stored.columns, strict=True):
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if any(is_kind(column.type) for is_kind in numbers):
            numeric = column.cast(arrow.float64(), safe=False)
            columns[name] = np.asarray(numeric.to_numpy(zero_copy_only=False))
        elif any(is_kind(column.type) for is_kind in texts):
            columns[name] = text_column(column.cast(arrow.string()).to_pylist())
        else:
            refuse_file(path, f"numbers, strings or dates in column {name}", str(column.type))
    return columns
