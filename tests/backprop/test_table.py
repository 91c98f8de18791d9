"""Files of every kind become the same columns; every refusal names file, line and column."""

from __future__ import annotations

import gzip
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels.errors import DataError, KindError, OptionError, ShapeError
from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.table import Table, read_table
from backprop.table.delimited import BLOCK_ROWS

NAN = float("nan")


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_lists(table: Table) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in table.columns.items()}


def same(left: dict[str, list[Any]], right: dict[str, list[Any]]) -> bool:
    return repr(left) == repr(right)  # NaN compares unequal to itself, and order counts


def message(
    call: Callable[..., object], *args: Any, error: type[Exception] = DataError, **options: Any
) -> str:
    with pytest.raises(error) as caught:
        call(*args, **options)
    return str(caught.value)


def reasons(table: Table) -> list[str]:
    return [str(row) for row in table.refused]


# --- CSV ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_dialects(tmp_path: Path, delimiter: str, newline: str, mark: str) -> None:
    rows = ['"a, b; c"|n', '"x, y"|1', "z|-2.5e1", '"quote """|']
    text = mark + newline.join(row.replace("|", delimiter) for row in rows) + newline
    table = read_table(write(tmp_path, text))
    expected = {"a, b; c": ["x, y", "z", 'quote "'], "n": [1.0, -25.0, NAN]}
    assert same(as_lists(table), expected)
    assert table.line_numbers.tolist() == [2, 3, 4]
    assert table.columns["n"].dtype == np.float64
    assert table.columns["a, b; c"].dtype == object


def test_spaces_after_a_delimiter_do_not_hide_a_quote(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'n, t\n 1, "a, b"\n2,  c\n'))
    assert same(as_lists(table), {"n": [1.0, 2.0], "t": ["a, b", "c"]})


def test_one_column_without_a_delimiter(tmp_path: Path) -> None:
    assert same(as_lists(read_table(write(tmp_path, "n\n1\n2"))), {"n": [1.0, 2.0]})


@pytest.mark.parametrize("marker", ["", "NA", "NaN", "nan", "null", "None", " NA "])
def test_missing_markers(tmp_path: Path, marker: str) -> None:
    table = read_table(write(tmp_path, f"n,t\n1,a\n{marker},{marker}\n3,b\n"))
    assert same(as_lists(table), {"n": [1.0, NAN, 3.0], "t": ["a", None, "b"]})
    assert table.refused == ()


def test_a_column_without_any_value_is_a_number_column(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "n,e\n1,\n2,NA\n"))
    assert same(as_lists(table), {"n": [1.0, 2.0], "e": [NAN, NAN]})


def test_line_numbers_count_blank_and_broken_lines(tmp_path: Path) -> None:
    text = '\nn,t\n1,"two\nlines"\n\n2,b\n3\n4,d\n'
    table = read_table(write(tmp_path, text), max_refused=0.5)
    assert same(as_lists(table), {"n": [1.0, 2.0, 4.0], "t": ["two\nlines", "b", "d"]})
    assert table.line_numbers.tolist() == [3, 6, 8]
    assert reasons(table) == ["line 7: expected 2 fields, found 1"]


def test_one_stray_in_a_hundred_is_refused_by_line(tmp_path: Path) -> None:
    values = [str(n) for n in range(100)]
    values[41] = "4l"
    table = read_table(write(tmp_path, "n,m\n" + "".join(f"{v},7\n" for v in values)))
    assert table.columns["n"].tolist() == [n for n in range(100) if n != 41]
    assert table.line_numbers.tolist() == [n + 2 for n in range(100) if n != 41]
    assert reasons(table) == ["line 43: column n: expected a number, found '4l'"]


def test_two_strays_in_a_hundred_make_text(tmp_path: Path) -> None:
    values = ["?", "?", *map(str, range(98))]
    table = read_table(write(tmp_path, "n,m\n" + "".join(f"{v},7\n" for v in values)))
    assert table.columns["n"].tolist() == values
    assert table.refused == ()


def test_the_share_of_strays_is_of_the_values_present(tmp_path: Path) -> None:
    """One stray among 50 values is text, however many cells are missing."""
    values = ["?", *["1"] * 49, *["NA"] * 150]
    table = read_table(write(tmp_path, "n,m\n" + "".join(f"{v},7\n" for v in values)))
    assert table.columns["n"].tolist() == ["?", *["1"] * 49, *[None] * 150]


def test_kinds_override_the_rule(tmp_path: Path) -> None:
    path = write(tmp_path, "code,n\n01,1\n02,?\n03,3\n")
    table = read_table(
        path, kinds={"code": "text", "n": "number", "other": "text"}, max_refused=0.4
    )
    assert same(as_lists(table), {"code": ["01", "03"], "n": [1.0, 3.0]})
    assert reasons(table) == ["line 3: column n: expected a number, found '?'"]


@pytest.mark.parametrize("stray", ["1_000", "12abc", "0x10", "1,5"])
def test_what_is_no_number(tmp_path: Path, stray: str) -> None:
    table = read_table(write(tmp_path, f'n;m\n1;1\n"{stray}";2\n'))
    assert table.columns["n"].tolist() == ["1", stray]


@pytest.mark.parametrize(
    ("cell", "found"), [("inf", "+inf"), ("-Infinity", "-inf"), ("1e999", "+inf")]
)
def test_infinity_is_refused(tmp_path: Path, cell: str, found: str) -> None:
    table = read_table(write(tmp_path, f"n,m\n1,1\n{cell},2\n"), max_refused=0.5)
    assert table.columns["n"].tolist() == [1.0]
    assert reasons(table) == [f"line 3: column n: expected a finite number, found {found}"]


def test_too_many_refused_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n" + "1,2\n" * 193 + "1\n" * 6 + "1,2,3\n")
    assert message(read_table, path) == (
        f"{path}: expected at most 1.00% of the rows refused and some left, got 7 of 200 refused:\n"
        "  line 195: expected 2 fields, found 1\n"
        "  line 196: expected 2 fields, found 1\n"
        "  line 197: expected 2 fields, found 1\n"
        "  line 198: expected 2 fields, found 1\n"
        "  line 199: expected 2 fields, found 1\n"
        "  …\n"
        "mend these rows, or give them up with a larger max_refused (--max-refused)"
    )
    table = read_table(path, max_refused=7 / 200)
    assert (len(table), len(table.refused)) == (193, 7)
    assert str(table.refused[-1]) == "line 201: expected 2 fields, found 3"


def test_a_row_with_two_faults_is_refused_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n" + "1,2\n" * 199 + "x,inf\n")
    table = read_table(path)
    assert reasons(table) == ["line 201: column a: expected a number, found 'x'"]


def test_nothing_left(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n1\n")
    assert "got 1 of 1 refused" in message(read_table, path, max_refused=1.0)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "expected a header row of column names, got an empty file"),
        ("a,b\n", "expected at least one column and one row of data, got none"),
        ("1,2.5\n3,4\n", "expected a header row of column names, got only numbers: ['1', '2.5']"),
        ("a,b,a,b\n1,2,3,4\n", "expected distinct column names, got repeated a, b"),
        (
            "a,,b\n1,2,3\n",
            "expected a name for every column, got none for column 2 "
            "(with pandas, to_csv(index=False) omits it)",
        ),
        (
            'a,b\n1,2\n"3,4\n5,6\n',
            "expected well-formed CSV (is a quote left open?), got line 4: unexpected end of data",
        ),
        (
            'a,b\n"1"x,2\n',
            "expected well-formed CSV (is a quote left open?), got line 2: ',' expected after '\"'",
        ),
        (b"a,b\n1,caf\xe9\n", "expected UTF-8 text, got byte 0xe9 on line 2"),
        (b"\xef\xbb\xbfa,b\n1,2\n1,\xff\n", "expected UTF-8 text, got byte 0xff on line 3"),
    ],
)
def test_unusable_csv(tmp_path: Path, text: str | bytes, wrong: str) -> None:
    path = write(tmp_path, text)
    assert message(read_table, path) == f"{path}: {wrong}"


def test_compressed_files(tmp_path: Path) -> None:
    plain = b"n,t\n1,a\n2,b\n"
    zipped = tmp_path / "t.csv.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t.csv", plain)
    for path in (write(tmp_path, gzip.compress(plain), "t.csv.gz"), zipped):
        table = read_table(path)
        assert same(as_lists(table), {"n": [1.0, 2.0], "t": ["a", "b"]})
        assert table.line_numbers.tolist() == [2, 3]


def test_unusable_compressed_files(tmp_path: Path) -> None:
    two = tmp_path / "two.zip"
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("b.csv", "b\n1\n")
    assert message(read_table, two) == (
        f"{two}: expected a zip file with one member, got ['a.csv', 'b.csv']"
    )
    cut = write(tmp_path, gzip.compress(b"n\n" + b"1\n" * 999)[:-9], "cut.csv.gz")
    wrong = "expected a whole .gz file without a password"
    assert message(read_table, cut).startswith(f"{cut}: {wrong}, got ")
    junk = write(tmp_path, "junk", "junk.zip")
    assert message(read_table, junk) == (
        f"{junk}: expected a whole .zip file without a password, got File is not a zip file"
    )


def test_columns_keeps_the_named_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,c\n1,x,3\n4,y,6\n")
    assert same(as_lists(read_table(path, columns=("c", "a"))), {"a": [1.0, 4.0], "c": [3.0, 6.0]})
    wrong = "expected columns d, e, got none so named"
    assert message(read_table, path, columns=("a", "e", "d")) == f"{path}: {wrong}"


def test_options_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n1\n")
    assert message(read_table, path, kinds={"a": "int"}, error=OptionError) == (
        "read_table: kinds['a']: expected 'number' or 'text', got 'int'"
    )
    assert message(read_table, path, max_refused=5, error=OptionError) == (
        "read_table: max_refused: expected 0 to 1, got 5"
    )
    assert message(read_table, tmp_path / "t.xlsx", error=OptionError) == (
        "read_table: path: expected a name ending in .csv, .tsv, .txt, .gz, .zip, .npz, .npy or "
        ".parquet, got 't.xlsx'"
    )
    for name in ("none.csv", "none.npz", "none.npy", "none.parquet"):
        with pytest.raises(FileNotFoundError):
            read_table(tmp_path / name)


CELLS = st.one_of(
    st.floats(allow_infinity=False).map(repr),
    st.sampled_from(["", "NA", "a", "b;c", 'd"e', "f,g", "h\ni", "7"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=30), st.sampled_from(",;\t"))
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    import csv

    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("p", "q"), *rows])
    table = read_table(path, kinds={"p": "text", "q": "text"})
    expected = [[None if cell in ("", "NA", "nan") else cell for cell in row] for row in rows]
    assert [list(row) for row in zip(*table.columns.values(), strict=True)] == expected


def test_rows_survive_the_block_boundary(tmp_path: Path) -> None:
    rows = 2 * BLOCK_ROWS + 3
    path = write(tmp_path, "n,t\n" + "".join(f"{n},t{n}\n" for n in range(rows)))
    table = read_table(path)
    assert table.columns["n"].tolist() == list(range(rows))
    assert table.columns["t"].tolist() == [f"t{n}" for n in range(rows)]
    assert table.line_numbers.tolist() == list(range(2, rows + 2))


# --- binary files ---------------------------------------------------------------------------------


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.array([[1, 2], [3, 4], [5, 6]], np.int16))
    table = read_table(path)
    assert same(as_lists(table), {"x0": [1.0, 3.0, 5.0], "x1": [2.0, 4.0, 6.0]})
    assert (table.line_numbers.tolist(), table.unit) == ([1, 2, 3], "row")


def test_npz_of_a_matrix(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    X = np.array([[1, np.inf], [3, np.nan], [5, 6]], np.float32)
    np.savez(path, X=X, y=np.array([True, False, True]), columns=np.array(["a", "b"]))
    table = read_table(path, max_refused=0.4)
    assert same(as_lists(table), {"a": [3.0, 5.0], "b": [NAN, 6.0], "y": [0.0, 1.0]})
    assert table.line_numbers.tolist() == [2, 3]
    assert reasons(table) == ["row 1: column b: expected a finite number, found +inf"]
    np.savez(path, X=X[2:], y=np.array(["NA"]))
    assert same(as_lists(read_table(path)), {"x0": [5.0], "x1": [6.0], "y": [None]})


def test_npz_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    days = np.array(["2013-01-01", "NaT"], "M8[D]")
    np.savez(path, n=np.array([1, 2], np.uint8), t=np.array(["a", ""]), d=days)
    assert same(
        as_lists(read_table(path)), {"n": [1.0, 2.0], "t": ["a", None], "d": ["2013-01-01", None]}
    )
    assert same(as_lists(read_table(path, columns=["t"])), {"t": ["a", None]})


X32 = np.zeros((3, 2))
NOTHING = "expected at least one column and one row of data, got none"


@pytest.mark.parametrize(
    ("arrays", "wrong"),
    [
        ({"X": np.zeros(3)}, "expected X of shape (rows, features), got shape (3,)"),
        ({"X": X32, "z": np.zeros(3)}, "expected arrays X, y and columns, got also z"),
        ({"X": X32, "y": X32[:, :1]}, "expected array y of shape (rows,), got shape (3, 1)"),
        (
            {"X": X32, "y": np.zeros(2)},
            "expected columns of one length, got {'x0': 3, 'x1': 3, 'y': 2}",
        ),
        (
            {"X": X32, "columns": np.array(["a"])},
            "expected `columns` of shape (2,) holding strings, got shape (1,) of <U1",
        ),
        (
            {"X": X32, "columns": np.array(["x", "y"])},
            "expected names in `columns` other than 'y', got 'y'",
        ),
        (
            {"X": X32, "columns": np.array(["a", "a"])},
            "expected distinct column names, got repeated a",
        ),
        (
            {"a": np.zeros(3), "b": np.zeros(2)},
            "expected columns of one length, got {'a': 3, 'b': 2}",
        ),
        (
            {"a": np.zeros(2, complex)},
            "expected numbers, strings or dates in array a, got complex128",
        ),
        ({"a": np.zeros(0)}, NOTHING),
        ({}, NOTHING),
    ],
)
def test_unusable_npz(tmp_path: Path, arrays: dict[str, Any], wrong: str) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, **arrays)
    assert message(read_table, path) == f"{path}: {wrong}"


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    expected = "expected a whole .npy or .npz file of plain arrays"
    for name, save in (("t.npy", np.save), ("t.npz", np.savez)):
        path = tmp_path / name
        save(path, np.array([[{}]], object), allow_pickle=True)
        assert message(read_table, path) == (
            f"{path}: {expected}, got Object arrays cannot be loaded when allow_pickle=False"
        )


def test_truncated_and_mislabelled_arrays(tmp_path: Path) -> None:
    npy, npz = tmp_path / "t.npy", tmp_path / "t.npz"
    np.save(npy, np.zeros((3, 2)))
    np.savez(npz, X=np.zeros((3, 2)))
    expected = "expected a whole .npy or .npz file of plain arrays"
    for path in (npy, npz):
        whole = path.read_bytes()
        for size in (0, 5, 60, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert message(read_table, path).startswith(f"{path}: {expected}, got ")
        path.write_bytes(whole)
    swapped = write(tmp_path, npy.read_bytes(), "swapped.npz")
    assert message(read_table, swapped) == (
        f"{swapped}: expected an archive of arrays, got a single array (an .npy file)"
    )
    swapped = write(tmp_path, npz.read_bytes(), "swapped.npy")
    assert message(read_table, swapped) == (
        f"{swapped}: expected a single array, got an archive (an .npz file)"
    )


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    columns = {
        "i": arrow.array([1, None, 3], arrow.int32()),
        "f": arrow.array([0.5, 1.5, None], arrow.float32()),
        "b": arrow.array([True, None, False]),
        "t": arrow.array(["a", None, "NA"]),
        "c": arrow.array(["u", "v", "u"]).dictionary_encode(),
        "d": arrow.array([0, 1, None], arrow.date32()),
        "e": arrow.nulls(3),
        "g": arrow.array([2**60 + 1, 1, 2]),
    }
    parquet.write_table(arrow.table(columns), path)
    assert same(
        as_lists(read_table(path)),
        {
            "i": [1.0, NAN, 3.0],
            "f": [0.5, 1.5, NAN],
            "b": [1.0, NAN, 0.0],
            "t": ["a", None, None],
            "c": ["u", "v", "u"],
            "d": ["1970-01-01", "1970-01-02", None],
            "e": [NAN, NAN, NAN],
            "g": [2.0**60, 1.0, 2.0],
        },
    )
    parquet.write_table(arrow.table({"l": [[1], [2]]}), path)
    assert message(read_table, path) == (
        f"{path}: expected numbers, strings or dates in column l, got list<element: int64>"
    )
    path.write_bytes(path.read_bytes()[:-20])
    assert message(read_table, path).startswith(f"{path}: expected a whole Parquet file, got ")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, "", "t.parquet")
    assert message(read_table, path) == (
        f"{path}: expected pyarrow, which reads Parquet, got no pyarrow; "
        'pip install "fused-backprop[parquet]"'
    )


# --- tables ---------------------------------------------------------------------------------------


def test_take_keeps_rows_and_lines_together(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "n,t\n1,a\n2,b\n3,c\n"))
    taken = table.take(np.array([2, 0]))
    assert same(as_lists(taken), {"n": [3.0, 1.0], "t": ["c", "a"]})
    assert (taken.line_numbers.tolist(), taken.place(0)) == ([4, 2], "line 4")
    assert as_lists(table.take(np.array([False, True, False]))) == {"n": [2.0], "t": ["b"]}


def test_require_refuses_rows_without_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "n,t\n" + "1,a\n" * 197 + "2\n" + ",b\n3,\n")
    table = read_table(path)
    required = table.require("n")
    assert reasons(required) == [
        "line 199: expected 2 fields, found 1",
        "line 200: column n: expected a value, found none",
    ]
    assert required.columns["n"].tolist() == [1.0] * 197 + [3.0]
    # The rows refused earlier count too: 3 of 200 are more than 1 %.
    assert "got 3 of 200 refused" in message(required.require, "t")
    assert len(required.require("t", max_refused=0.015)) == 197
    assert message(table.require, "y") == (f"{path}: expected a column 'y', got columns n, t")


def test_tables_made_by_hand_are_checked() -> None:
    lines = np.arange(1, 3)
    assert message(Table, "t", {"a": np.zeros(3)}, lines, error=ShapeError) == (
        "Table: columns['a']: expected shape (2,), one value for each line number, got (3,)"
    )
    assert message(Table, "t", {"a": np.zeros(2, np.int64)}, lines, error=KindError) == (
        "Table: columns['a']: expected dtype float64 or object (text), got int64"
    )
