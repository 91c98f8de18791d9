"""Data frames: pandas and Arrow give the table that the same CSV gives."""

from __future__ import annotations

import datetime
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.cli import main
from backprop.table import Encoder, Table, read_table
from tests.backprop.test_cli import SMALL, write_rows

pandas = pytest.importorskip("pandas")
arrow = pytest.importorskip("pyarrow")


def same(a: Table, b: Table) -> None:
    assert list(a.columns) == list(b.columns)
    for name, values in a.columns.items():
        np.testing.assert_array_equal(values, b.columns[name], err_msg=name)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "people.csv")


def test_the_same_table_from_every_source(people: Path) -> None:
    expected = read_table(people)
    frame = pandas.read_csv(people)
    same(expected, read_table(frame))
    same(expected, read_table(frame.convert_dtypes()))  # pandas' own nullable dtypes
    same(expected, read_table(frame.astype({"city": "category"})))
    table = arrow.Table.from_pandas(frame, preserve_index=False)
    same(expected, read_table(table))
    same(expected, read_table(table.combine_chunks().to_batches()[0]))
    kept = read_table(frame, columns=["age", "late"])
    assert list(kept.columns) == ["age", "late"]


def test_every_kind_of_column() -> None:
    nat = pandas.NaT
    frame = pandas.DataFrame(
        {
            "flag": [True, False],
            "maybe": pandas.array([True, None], dtype="boolean"),
            "mixed": pandas.Series([True, None], dtype=object),
            "count": pandas.array([1, None], dtype="Int64"),
            "day": [datetime.datetime(2013, 1, 1), nat],
            "name": ["NA", "x"],
            3: [1.5, np.nan],
        }
    )
    columns = read_table(frame).columns
    for name, values in {
        "flag": [1.0, 0.0], "maybe": [1.0, np.nan], "mixed": [1.0, np.nan],
        "count": [1.0, np.nan], "3": [1.5, np.nan],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(columns[name], values, err_msg=name)
    assert columns["day"].tolist() == ["2013-01-01", None]
    assert columns["name"].tolist() == [None, "x"]
    table = arrow.table(
        {"d": [Decimal("1.5"), None], "s": arrow.array(["a", None]).dictionary_encode()}
    )
    assert read_table(table).columns["s"].tolist() == ["a", None]
    np.testing.assert_array_equal(read_table(table).columns["d"], [1.5, np.nan])


def test_refusals() -> None:
    for frame, message in [
        (pandas.DataFrame({"a": [[1], [2]]}), "DataFrame: expected numbers, .* column a, got list"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "expected distinct column names"),
        (pandas.DataFrame({"a": []}), "expected at least one column and one row"),
        (pandas.DataFrame({"a": [1.0, np.inf]}), "row 2: column a: expected a finite number"),
        (arrow.table({"a": [[1], [2]]}), "Table: expected numbers, .* column a, got list"),
    ]:
        with pytest.raises(bp.DataError, match=message):
            read_table(frame)


def test_raw_frames_are_predicted_and_encoded(people: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "m.safetensors")
    assert main(["fit", str(people), "--target", "late", "-o", path, "-q", *SMALL]) == 0
    model = bp.load(path, device="reference")
    expected = model.predict(read_table(people))
    frame = pandas.read_csv(people)
    for rows in (frame, frame.drop(columns="late"), arrow.Table.from_pandas(frame)):
        np.testing.assert_array_equal(model.predict(rows), expected)
    encoders = [Encoder.fit(read_table(source), target="late") for source in (frame, people)]
    assert encoders[0] == encoders[1]
    with pytest.raises(bp.DataError, match="expected columns age"):
        model.predict(frame.drop(columns="age"))


class Pairs:
    """A sequence of its own kind."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> list[float]:
        if not 0 <= i < 8:
            raise IndexError(i)
        return [float(i), i * 0.5]


def test_numbers_of_any_container_train_the_same() -> None:
    X = np.array([Pairs()[i] for i in range(8)])
    y = X[:, 0] - X[:, 1]
    frame = pandas.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": y})
    table = arrow.Table.from_pandas(frame)
    sources: list[tuple[Any, Any]] = [
        (X, y),
        (frame[["a", "b"]], frame["y"]),
        (table.select(["a", "b"]), table["y"]),
        (Pairs(), y.tolist()),
    ]
    trained = []
    for source in sources:
        model = bp.MLP([2, 3, 1], device="reference")
        bp.fit(model, *source, epochs=2, batch_size=3, shuffle=False)
        trained.append(model.parameters)
    for parameters in trained[1:]:
        np.testing.assert_array_equal(parameters, trained[0])


def test_no_library_is_imported_to_find_out_what_a_frame_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "pandas")
    monkeypatch.delitem(sys.modules, "pyarrow")
    with pytest.raises(bp.OptionError, match="expected a name ending in"):
        read_table("people.xlsx")
    assert "pandas" not in sys.modules and "pyarrow" not in sys.modules
