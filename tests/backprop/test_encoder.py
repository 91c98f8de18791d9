"""An encoder learns from training rows alone, survives JSON, and refuses what it cannot encode."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels.errors import CheckpointFormatError, DataError, LabelError, OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.table import Encoder, Table, read_table
from backprop.table.encoding import NumberColumn, Target, TextColumn

NAN = float("nan")


def table_of(columns: dict[str, list[Any]]) -> Table:
    """Numbers with NaN, or text with None."""
    arrays = {
        name: np.array(values, object if any(isinstance(v, str) for v in values) else np.float64)
        for name, values in columns.items()
    }
    return Table("t.csv", arrays, np.arange(2, 2 + len(next(iter(arrays.values())))), "line")


def message(
    call: Callable[..., object], *args: Any, error: type[Exception] = DataError, **options: Any
) -> str:
    with pytest.raises(error) as caught:
        call(*args, **options)
    return str(caught.value)


TRAINING = table_of(
    {
        "age": [10.0, NAN, 30.0, 80.0],
        "city": ["Rome", "Oslo", None, "Rome"],
        "y": ["no", "yes", "no", "no"],
        "still": [0.1, 0.1, NAN, 0.1],
    }
)


def test_known_values() -> None:
    encoder = Encoder.fit(TRAINING, target="y")
    assert encoder.feature_names == ("age", "city=Oslo", "city=Rome", "still")
    filled = np.array([10.0, 30.0, 30.0, 80.0])  # the median of 10, 30, 80 fills the gap
    z = (filled - 37.5) / np.sqrt(np.mean((filled - 37.5) ** 2))
    X = encoder.transform(TRAINING)
    expected = np.array([[z[0], 0, 1, 0], [z[1], 1, 0, 0], [z[2], 0, 0, 0], [z[3], 0, 1, 0]])
    np.testing.assert_array_equal(X, expected.astype(np.float32))
    assert X.dtype == np.float32 and X.flags.c_contiguous
    assert encoder.task == "binary" and encoder.classes == ("no", "yes")
    y = encoder.encode_target(TRAINING)
    assert y.dtype == np.float32 and y.tolist() == [0, 1, 0, 0]
    assert encoder.notes == ("still: at most one value in training, encoded as 0",)


def test_later_rows_use_what_training_taught() -> None:
    """Medians, scales and categories are not learned again; extra columns are ignored."""
    encoder = Encoder.fit(TRAINING, target="y")
    later = table_of(
        {
            "still": [7.0, NAN],
            "more": [1.0, 2.0],
            "city": ["Paris", "Oslo"],
            "age": [NAN, 1000.0],
        }
    )
    column = encoder.columns[0]
    assert isinstance(column, NumberColumn)
    z = (np.array([30.0, 1000.0]) - column.mean) / column.scale
    np.testing.assert_array_equal(
        encoder.transform(later), np.array([[z[0], 0, 0, 0], [z[1], 1, 0, 0]], np.float32)
    )


def test_raw_rows_are_read_as_the_training_file_was(tmp_path: Path) -> None:
    """A code column that happens to hold only digits later must still be text."""
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("code,n,y\n01,1,a\nA7,2,b\n02,4,a\n")
    second.write_text("code,n\n01,\n02,1\n")
    encoder = Encoder.fit(read_table(first), target="y")
    assert encoder.kinds == {"code": "text", "n": "number", "y": "text"}
    assert message(encoder.transform, read_table(second)) == (
        f"{second}: line 2: column code: expected text as in the training file, "
        "got 1.0; read the file with kinds=encoder.kinds"
    )
    X = encoder.transform(read_table(second, kinds=encoder.kinds))
    assert X[:, :3].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_column_without_values_fits_either_kind() -> None:
    encoder = Encoder.fit(TRAINING, target="y")
    later = table_of({"age": [5.0], "city": [NAN], "still": [NAN]})
    assert encoder.transform(later)[0, 1:].tolist() == [0, 0, 0]


def test_lacking_columns_are_named() -> None:
    encoder = Encoder.fit(TRAINING, target="y")
    later = table_of({"city": ["Rome"], "age": [1.0]})
    del later.columns["age"]
    assert message(encoder.transform, later) == (
        "t.csv: expected the columns of the training file, got city; lacking: age, still"
    )
    assert message(encoder.encode_target, later) == (
        "t.csv: expected a target column 'y', got columns city"
    )


def test_drop_leaves_columns_out() -> None:
    encoder = Encoder.fit(TRAINING, target="y", drop=["age", "still"])
    assert encoder.feature_names == ("city=Oslo", "city=Rome")
    assert message(Encoder.fit, TRAINING, target="y", drop=["aeg"], error=OptionError) == (
        "Encoder.fit: drop: expected columns of age, city, y, still; got aeg"
    )
    assert message(Encoder.fit, TRAINING, target="z", error=OptionError) == (
        "Encoder.fit: target: expected columns of age, city, y, still; got z"
    )
    assert message(Encoder.fit, TRAINING, target="y", drop=["y"], error=OptionError) == (
        "Encoder.fit: drop: expected columns of age, city, y, still; got y, which is the target"
    )
    assert message(Encoder.fit, TRAINING, target="y", drop=["age", "city", "still"]) == (
        "t.csv: expected a column besides the target, got none"
    )


def test_columns_that_are_no_categories_are_all_named() -> None:
    ids = [f"id{n:03}" for n in range(257)]
    columns: dict[str, list[Any]] = {
        "id": ids,
        "fine": ids[:256] + ids[:1],
        "day": ["2013-01-01"] * 256 + [None],
        "at": ["2013-01-01T10:00:00Z", "2013-01-01 10:00"] * 128 + ["2013-01-01T10:00:00.5+01:00"],
        "hour": ["10:00", "10:30:15"] * 128 + ["23:59"],
        "y": [0.0, 1.0] * 128 + [0.0],
    }
    assert message(Encoder.fit, table_of(columns), target="y") == (
        "t.csv: expected columns of numbers or categories, got:\n"
        "  id: 257 distinct texts, such as 'id000'\n"
        "  day: dates or times, such as '2013-01-01'\n"
        "  at: dates or times, such as '2013-01-01 10:00'\n"
        "  hour: dates or times, such as '10:00'\n"
        "leave them out (drop=[…], or --drop id --drop day --drop at --drop hour), "
        "or turn them into numbers first"
    )
    encoder = Encoder.fit(table_of(columns), target="y", drop=["id", "day", "at", "hour"])
    assert len(encoder.feature_names) == 256


def test_a_misread_number_column_is_noted() -> None:
    column = TextColumn("size", ("1", "2", "?"))
    assert Encoder((column,), Target("y", "regression")).notes == (
        "size: text because of '?', though most categories are numbers; "
        "kinds={'size': 'number'} refuses the rows that are not",
    )
    for categories in (("1", "2"), ("1", "?", "a"), ("a", "b")):
        column = TextColumn("size", categories)
        assert Encoder((column,), Target("y", "regression")).notes == ()


# --- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "task", "classes", "encoded"),
    [
        (["b", "a", "b"], "binary", ("a", "b"), [1, 0, 1]),
        (["b", "a", "c"], "multiclass", ("a", "b", "c"), [1, 0, 2]),
        ([1.0, 0.0, 1.0], "binary", (0, 1), [1, 0, 1]),
        ([7.0, -3.0, 7.0], "binary", (-3, 7), [1, 0, 1]),
        ([5.0, 2.0, 9.0], "multiclass", (2, 5, 9), [1, 0, 2]),
        (list(map(float, range(20))), "multiclass", tuple(range(20)), list(range(20))),
    ],
)
def test_classes(
    values: list[Any], task: str, classes: tuple[Any, ...], encoded: list[int]
) -> None:
    table = table_of({"x": list(map(float, range(len(values)))), "y": values})
    encoder = Encoder.fit(table, target="y")
    assert (encoder.task, encoder.classes) == (task, classes)
    assert encoder.outputs == (1 if task == "binary" else len(classes))
    assert all(type(label) in (str, int) for label in encoder.classes)
    y = encoder.encode_target(table)
    assert y.tolist() == encoded
    assert y.dtype == (np.float32 if task == "binary" else np.int64)
    assert encoder.decode_target(y).tolist() == values


@pytest.mark.parametrize("values", [list(map(float, range(21))), [0.0, 1.5], [0.0, 1.0, 1e-9]])
def test_other_numbers_are_regression(values: list[float]) -> None:
    table = table_of({"x": list(map(float, range(len(values)))), "y": values})
    encoder = Encoder.fit(table, target="y")
    assert (encoder.task, encoder.classes, encoder.outputs) == ("regression", (), 1)
    y = encoder.encode_target(table)
    expected = (np.array(values) - np.mean(values)) / np.std(values)
    np.testing.assert_array_equal(y, expected.astype(np.float32))
    np.testing.assert_allclose(encoder.decode_target(y), values, rtol=1e-6, atol=1e-6)


def test_task_overrides_the_inference() -> None:
    table = table_of({"x": [1.0, 2.0, 3.0], "y": [0.0, 1.0, 1.0]})
    multiclass = Encoder.fit(table, target="y", task="multiclass")
    assert multiclass.encode_target(table).dtype == np.int64
    regression = Encoder.fit(table, target="y", task="regression")
    assert (regression.target.mean, regression.target.scale) == (
        pytest.approx(2 / 3),
        pytest.approx(np.sqrt(2) / 3),
    )


@pytest.mark.parametrize(
    ("values", "task", "wrong"),
    [
        (["a", "a", "a"], "auto", "2 to 256 classes for multiclass, got 1 distinct texts: ['a']"),
        (
            [1.0, 1.0, 1.0],
            "regression",
            "numbers that differ for regression, got 1 distinct numbers: [1.0]",
        ),
        (["a", "b", "c"], "binary", "2 classes for binary, got 3 distinct texts: ['a', 'b', 'c']"),
        (["a", "b", "a"], "regression", "numbers for regression, got 2 distinct texts: ['a', 'b']"),
        (
            [0.5, 1.0, 1.0],
            "binary",
            "texts or integers as classes for binary, got 2 distinct numbers: [0.5, 1.0]",
        ),
    ],
)
def test_targets_that_do_not_suit_the_task(values: list[Any], task: Any, wrong: str) -> None:
    table = table_of({"x": [1.0, 2.0, 3.0], "y": values})
    assert (
        message(Encoder.fit, table, target="y", task=task) == f"t.csv: target y: expected {wrong}"
    )


def test_unknown_task() -> None:
    assert message(Encoder.fit, TRAINING, target="y", task="rank", error=OptionError) == (
        "Encoder.fit: task: expected one of auto, binary, multiclass, regression, got 'rank'"
    )


def test_rows_without_a_target_are_named() -> None:
    table = table_of({"x": [1.0] * 8, "y": ["a", None, "b", *[None] * 5]})
    wrong = (
        "t.csv: column y: expected a value in every row, got 6 without "
        "(line 3, line 5, line 6, line 7, line 8, …); leave these rows out with table.require('y')"
    )
    assert message(Encoder.fit, table, target="y") == wrong
    encoder = Encoder.fit(table.require("y", max_refused=1), target="y")
    assert message(encoder.encode_target, table) == wrong


def test_unknown_classes_are_refused_both_ways() -> None:
    encoder = Encoder.fit(TRAINING, target="y")
    assert message(encoder.encode_target, table_of({"y": ["no", "maybe"]})) == (
        "t.csv: line 3: column y: expected a class of the training rows (['no', 'yes']), "
        "got 'maybe'"
    )
    for wrong in ([2], [-1], [0.5], [NAN]):
        got = repr(np.array(wrong))
        assert message(encoder.decode_target, wrong, error=LabelError) == (
            f"Encoder.decode_target: values: expected class indices 0 to 1, got {got}"
        )


# --- numbers at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1e300, -1e300, 0.0], [0.0, 1e-200, 2e-200]])
def test_a_variance_beyond_float64_is_refused(values: list[float]) -> None:
    table = table_of({"x": values, "y": [0.0, 1.0, 0.0]})
    assert message(Encoder.fit, table, target="y") == (
        "Encoder.fit: column x: expected numbers whose variance float64 can hold, "
        f"got {min(values)} to {max(values)}; rescale them, or leave them out with --drop x"
    )


def test_a_number_beyond_float32_is_refused() -> None:
    encoder = Encoder.fit(table_of({"x": [-1.0, 1.0], "y": [0.0, 1.0]}), target="y")
    assert encoder.transform(table_of({"x": [3e38]})).tolist() == [[float(np.float32(3e38))]]
    assert message(encoder.transform, table_of({"x": [0.0, 4e38]})) == (
        "t.csv: line 3: column x: expected a number near the training rows' "
        "(mean 0, deviation 1), got 4e+38"
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=2, max_size=40))
def test_training_columns_have_mean_0_and_deviation_1(values: list[float]) -> None:
    table = table_of({"x": values, "y": [0.0, 1.0, *[0.0] * (len(values) - 2)]})
    present = [value for value in values if value == value]
    if len(set(present)) > 1 and np.std(present) < 1e-6:
        return  # the spread is lost in float64 rounding of the mean
    x = Encoder.fit(table, target="y").transform(table)[:, 0].astype(np.float64)
    assert abs(x.mean()) < 1e-5
    assert x.std() == pytest.approx(1 if len(set(present)) > 1 else 0, abs=1e-4)


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["y", "age", "still"])
def test_an_encoder_survives_json(target: str) -> None:
    table = TRAINING if target == "y" else TRAINING.require(target, max_refused=1)
    if target == "still":
        table.columns["still"] = np.array([3.0, 4.0, 5.0])
    encoder = Encoder.fit(table, target=target)
    stored = json.loads(json.dumps(encoder.to_dict(), allow_nan=False))
    assert Encoder.from_dict(stored) == encoder


def test_the_stored_form_is_a_promise() -> None:
    encoder = Encoder(
        (NumberColumn("a", 1.0, 2.0, 3.0), TextColumn("b", ("u", "v"))),
        Target("y", "binary", (0, 1)),
    )
    stored = {
        "columns": [
            {"name": "a", "median": 1.0, "mean": 2.0, "scale": 3.0},
            {"name": "b", "categories": ["u", "v"]},
        ],
        "target": {"name": "y", "task": "binary", "classes": [0, 1]},
    }
    assert encoder.to_dict() == stored
    assert Encoder.from_dict(stored) == encoder
    stored["target"] = {"name": "y", "task": "regression", "mean": -1.0, "scale": 2.5}
    regression = Encoder(encoder.columns, Target("y", "regression", (), -1.0, 2.5))
    assert Encoder.from_dict(stored) == regression
    assert regression.to_dict() == stored


STORED: dict[str, Any] = Encoder.fit(TRAINING, target="y").to_dict()


def stored_with(where: str, value: Any) -> Any:
    """STORED with the part at `where`, such as columns[0].name, replaced."""
    stored: Any = copy.deepcopy(STORED)
    *path, last = (int(key) if key.isdigit() else key for key in re.findall(r"\w+", where))
    place = stored
    for key in path:
        place = place[key]
    place[last] = value
    return stored


def refusal(stored: Any) -> str:
    """The middle of the message, whose start and end never change."""
    start, end = "Encoder.from_dict: ", "; the model file is damaged or of another version"
    got = message(Encoder.from_dict, stored, error=CheckpointFormatError)
    assert got.startswith(start) and got.endswith(end)
    return got[len(start) : -len(end)]


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("columns", [], "a list of at least one column"),
        ("columns", {}, "a list of at least one column"),
        ("columns[0]", [], "an object with the keys mean, median, name, scale"),
        ("columns[0].name", "", "a name"),
        ("columns[0].name", 3, "a name"),
        ("columns[0].median", "1", "a finite number"),
        ("columns[0].median", NAN, "a finite number"),
        ("columns[0].mean", True, "a finite number"),
        ("columns[0].mean", float("inf"), "a finite number"),
        ("columns[0].scale", None, "a finite number"),
        ("columns[0].scale", -1.0, "a number that is not negative"),
        ("columns[1].name", None, "a name"),
        ("columns[1].categories", ["b", "a"], "at most 256 sorted, distinct strings"),
        ("columns[1].categories", ["a", "a"], "at most 256 sorted, distinct strings"),
        ("columns[1].categories", [1, 2], "at most 256 sorted, distinct strings"),
        ("columns[1].categories", "ab", "at most 256 sorted, distinct strings"),
        ("target.task", [], "one of binary, multiclass, regression"),
        ("target.name", None, "a name"),
        ("target.classes", ["no"], "2 classes"),
        ("target.classes", ["a", "b", "c"], "2 classes"),
        ("target.classes", [0, "a"], "a sorted list of distinct strings or integers"),
        ("target.classes", [False, True], "a sorted list of distinct strings or integers"),
        ("target.classes", [0.0, 1.0], "a sorted list of distinct strings or integers"),
    ],
)
def test_malformed_parts_are_refused(where: str, value: Any, expected: str) -> None:
    assert refusal(stored_with(where, value)) == f"{where}: expected {expected}, got {value!r}"


def test_malformed_wholes_are_refused() -> None:
    keys = "expected an object with the keys"
    assert refusal(None) == f"encoder: {keys} columns, target, got None"
    assert refusal(stored_with("more", 1)) == (
        f"encoder: {keys} columns, target, got ['columns', 'target', 'more']"
    )
    assert refusal(stored_with("columns[1].kind", "text")) == (
        f"columns[1]: {keys} categories, name, got ['name', 'categories', 'kind']"
    )
    assert refusal(stored_with("target", None)) == (
        "target.task: expected one of binary, multiclass, regression, got None"
    )
    assert refusal(stored_with("target.task", "regression")) == (
        f"target: {keys} mean, name, scale, task, got ['name', 'task', 'classes']"
    )
    for name, names in (
        ("y", ["y", "y", "city", "still"]),
        ("city", ["y", "city", "city", "still"]),
    ):
        assert refusal(stored_with("columns[0].name", name)) == (
            f"columns: expected distinct names, none of them the target's, got {names}"
        )
    many = [f"{n:03}" for n in range(257)]
    assert refusal(stored_with("columns[1].categories", many)).startswith(
        "columns[1].categories: expected at most 256 sorted, distinct strings, got ['000', "
    )
    target = {"name": "y", "task": "multiclass", "classes": many}
    assert refusal(stored_with("target", target)).startswith(
        "target.classes: expected 2 to 256 classes, got ['000', "
    )


def test_malformed_regression_targets_are_refused() -> None:
    for scale, wrong in ((0, "a positive number, got 0.0"), (10**400, "a finite number, got 1000")):
        target = {"name": "y", "task": "regression", "mean": 0, "scale": scale}
        got = refusal(stored_with("target", target))
        assert got.startswith(f"target.scale: expected {wrong}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_other_json_is_refused_or_valid(data: st.DataObject) -> None:
    """Replace any part of a good encoder by any JSON: refused with our error, or it can be used."""
    stored: Any = copy.deepcopy(STORED)
    place: Any = stored
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    try:
        encoder = Encoder.from_dict(stored)
    except CheckpointFormatError:
        return
    assert Encoder.from_dict(encoder.to_dict()) == encoder
