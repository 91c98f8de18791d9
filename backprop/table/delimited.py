"""Reads a `Table` from delimited text.

A cell is missing when it is one of '', NA, NaN, nan, null, None. A column holds numbers when every
value that is present parses as one, or when 99 % of them do; the rows of the others are then
refused. Otherwise it holds text. `kinds` overrides that rule for the columns it names.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from backprop.table.table import (
    MISSING,
    Kind,
    RefusedRow,
    Table,
    check_names,
    refuse_file,
    shown,
    text_column,
)

DELIMITERS = ",;\t"
NUMERIC_FRACTION = 0.99
# Rows moved to columns at a time. Equal cells of a block share a string, which halves peak memory;
# a block below the garbage collector's threshold keeps it from walking the rows, 1 s of 4.
BLOCK_ROWS = 512


def read_csv(
    path: Path, suffix: str, wanted: Collection[str] | None, kinds: Mapping[str, Kind]
) -> tuple[Table, dict[int, RefusedRow]]:
    """The table of a delimited text file, and those of its rows that hold a stray value."""
    text = _decoded(path, suffix)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=_delimiter(text),
        skipinitialspace=True,
        strict=True,
    )
    lines: list[int] = []
    ragged: list[RefusedRow] = []
    try:
        names = _header(path, next((row for row in reader if row), []))
        cells = {
            name: Cells(position, [])
            for position, name in enumerate(names)
            if wanted is None or name in wanted
        }
        block: list[list[str]] = []
        line = reader.line_num + 1  # where a row starts: a quoted field may hold line breaks
        for row in reader:
            if len(row) == len(names):
                block.append(row)
                lines.append(line)
                if len(block) == BLOCK_ROWS:
                    _move_to_columns(block, cells.values())
            elif row:
                fields = f"{len(names)} fields"
                ragged.append(RefusedRow(f"line {line}", None, fields, str(len(row))))
            line = reader.line_num + 1
        _move_to_columns(block, cells.values())
    except csv.Error as error:
        expected = "well-formed CSV (is a quote left open?)"
        refuse_file(path, expected, f"line {reader.line_num}: {error}", error)

    refused: dict[int, RefusedRow] = {}
    columns: dict[str, NDArray[Any]] = {}
    for name in list(cells):
        values = cells.pop(name).values  # freed before the next column is parsed
        columns[name], strays = _column(values, kinds.get(name))
        for index in strays:
            stray = RefusedRow(f"line {lines[index]}", name, "a number", shown(values[index]))
            refused.setdefault(index, stray)
    table = Table(str(path), columns, np.array(lines, np.int64), "line", tuple(ragged))
    return table, refused


class Cells(NamedTuple):
    """The text of one column, which is field `position` of each row."""

    position: int
    values: list[str]


def _move_to_columns(block: list[list[str]], columns: Iterable[Cells]) -> None:
    """Empty a block of rows into the columns, sharing equal strings."""
    seen: dict[str, str] = {}
    for position, values in columns:
        cells = [row[position] for row in block]
        values.extend([seen.setdefault(cell, cell) for cell in cells])
    block.clear()


def _decoded(path: Path, suffix: str) -> str:
    """The text of a plain or compressed file."""
    data = path.read_bytes()
    try:
        if suffix == ".gz":
            data = gzip.decompress(data)
        elif suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = archive.namelist()
                if len(members) != 1:
                    refuse_file(path, "a zip file with one member", shown(members))
                data = archive.read(members[0])
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        refuse_file(path, f"a whole {suffix} file without a password", str(error), error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # its object may lack the order mark
        byte = error.object[error.start]
        refuse_file(path, "UTF-8 text", f"byte 0x{byte:02x} on line {line}", error)


def _delimiter(text: str) -> str:
    """The delimiter that splits the header into the most fields; a comma when none splits it."""

    def fields(delimiter: str) -> int:
        reader = csv.reader(io.StringIO(text[:65536], newline=""), delimiter=delimiter)
        try:
            return len(next((row for row in reader if row), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=fields)


def _header(path: Path, row: Sequence[str]) -> list[str]:
    """The column names in the first row."""
    names = [name.strip() for name in row]
    if not names:
        refuse_file(path, "a header row of column names", "an empty file")
    check_names(path, names)
    if all(parse_number(name) is not None for name in names):
        refuse_file(path, "a header row of column names", f"only numbers: {shown(names)}")
    return names


def parse_number(text: str) -> float | None:
    """The number that a cell spells, NaN for a missing one, None for text."""
    try:
        # NOTE: float() would read the code 1_000 as a thousand.
        return None if "_" in text else float(text)
    except ValueError:
        return np.nan if text.strip() in MISSING else None


def _column(values: list[str], kind: Kind | None) -> tuple[NDArray[Any], list[int]]:
    """A column by the module's rule, and the rows whose value is not the number it should be."""
    if kind == "text":
        return text_column(values), []
    if "_" not in "".join(values):
        with suppress(ValueError):  # of the first missing or stray value
            return np.array([float(value) for value in values], np.float64), []
    parsed = {value: parse_number(value) for value in set(values)}
    strays = []
    if None in parsed.values():
        strays = [row for row, value in enumerate(values) if parsed[value] is None]
    numbers = np.array([parsed[value] for value in values], np.float64)  # None becomes NaN
    present = int(np.count_nonzero(~np.isnan(numbers))) + len(strays)
    if kind == "number" or len(strays) <= (1 - NUMERIC_FRACTION) * present:
        return numbers, strays
    return text_column(values), []
