"""Bad input: refused by name and place before the first step, and nothing is changed by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backprop as bp

rng = np.random.default_rng(0)
X, y, ids = rng.standard_normal((10, 3)), rng.standard_normal(10), np.arange(10) % 3
one_hot = np.eye(3)[ids]


def but(array: Any, place: Any, value: Any) -> Any:
    """A copy of `array` with one cell changed."""
    changed = array.copy()
    changed[place] = value
    return changed


# X, y, loss, outputs; the error; its message
DATA: list[tuple[tuple[Any, Any, Any, int], type[Exception], str]] = [
    (
        (but(X, (7, 2), np.nan), y, "mse", 1),
        bp.DataError,
        "fit: X: expected finite numbers, got NaN at row 7, column 2 (1 of 30); impute or drop "
        "such rows",
    ),
    (
        (but(but(X, (4, 1), -np.inf), (5, 0), np.nan), y, "mse", 1),
        bp.DataError,
        "fit: X: expected finite numbers, got infinity at row 4, column 1 (2 of 30); impute or "
        "drop such rows",
    ),
    (
        (but(X, (3, 0), 1e39), y, "mse", 1),
        bp.DataError,
        "fit: X as float32: expected finite numbers, got infinity at row 3, column 0 (1 of 30); "
        "impute or drop such rows",
    ),
    (
        (X, but(y, 9, np.nan), "mse", 1),
        bp.DataError,
        "loss mse: y: expected finite numbers, got NaN at row 9, column 0 (1 of 10); impute or "
        "drop such rows",
    ),
    (
        (X.astype(object), y, "mse", 1),
        bp.KindError,
        "fit: X: expected numbers, got dtype object; encode text columns first (`backprop fit` "
        "does)",
    ),
    (
        (np.full((10, 3), "a"), y, "mse", 1),
        bp.KindError,
        "fit: X: expected numbers, got dtype <U1; encode text columns first (`backprop fit` does)",
    ),
    ((X + 0j, y, "mse", 1), bp.KindError, "fit: X: expected numbers, got dtype complex128"),
    (
        (X.T, y, "mse", 1),
        bp.ShapeError,
        "fit: X: expected shape (batch, in_features=3), got (3, 10); is X transposed?",
    ),
    (
        (X[:, :2], y, "mse", 1),
        bp.ShapeError,
        "fit: X: expected shape (batch, in_features=3), got (10, 2)",
    ),
    (
        (X[:, 0], y, "mse", 1),
        bp.ShapeError,
        "fit: X: expected shape (batch, in_features=3), got (10,)",
    ),
    (
        (X[None], y, "mse", 1),
        bp.ShapeError,
        "fit: X: expected shape (batch, in_features=3), got (1, 10, 3)",
    ),
    (
        (X[:0], y[:0], "mse", 1),
        bp.DataError,
        "fit: X: expected at least one row, got shape (0, 3)",
    ),
    (
        (X, y[:9], "mse", 1),
        bp.ShapeError,
        "loss mse: y: expected shape (10, 1) or (10,), one row per row of X, got (9,)",
    ),
    (
        (X, y[None], "mse", 1),
        bp.ShapeError,
        "loss mse: y: expected shape (10, 1) or (10,), got (1, 10)",
    ),
    (
        (X, y[:, None, None], "mse", 1),
        bp.ShapeError,
        "loss mse: y: expected shape (10, 1) or (10,), got (10, 1, 1)",
    ),
    ((X, y, "mse", 2), bp.ShapeError, "loss mse: y: expected shape (10, 2), got (10,)"),
    (
        (X, y, "gaussian_nll", 3),
        bp.ShapeError,
        "loss gaussian_nll: model: expected an even number of outputs (mu, log variance), got 3",
    ),
    (
        (X, ids[:, None], "cross_entropy", 3),
        bp.ShapeError,
        "loss cross_entropy: y: expected shape (10,) class ids or (10, 3) probabilities, got "
        "(10, 1)",
    ),
    (
        (X, one_hot.T, "cross_entropy", 3),
        bp.ShapeError,
        "loss cross_entropy: y: expected shape (10,) class ids or (10, 3) probabilities, got "
        "(3, 10)",
    ),
    (
        (X, ids + 1, "cross_entropy", 3),
        bp.LabelError,
        "loss cross_entropy: y: expected class ids 0 … 2, got 3 at row 2 (3 such row(s))",
    ),
    (
        (X, but(ids, 6, -1), "cross_entropy", 3),
        bp.LabelError,
        "loss cross_entropy: y: expected class ids 0 … 2, got -1 at row 6 (1 such row(s))",
    ),
    (
        (X, but(ids * 1.0, 6, 1.5), "cross_entropy", 3),
        bp.LabelError,
        "loss cross_entropy: y: expected class ids 0 … 2, got 1.5 at row 6 (1 such row(s))",
    ),
    (
        (X, but(ids * 1.0, 6, np.nan), "cross_entropy", 3),
        bp.LabelError,
        "loss cross_entropy: y: expected class ids 0 … 2, got nan at row 6 (1 such row(s))",
    ),
    (
        (X, np.full(10, 2**64 - 1, np.uint64), "cross_entropy", 3),
        bp.LabelError,
        "loss cross_entropy: y: expected class ids 0 … 2, got 18446744073709551615 at row 0 "
        "(10 such row(s))",
    ),
    (
        (X, but(one_hot, (4, 1), 1.25), "cross_entropy", 3),
        bp.LabelError,
        "loss cross_entropy: y: expected class ids 0 … classes - 1, or rows of class "
        "probabilities; got 1.25 at row 4, column 1",
    ),
    (
        (X, but(np.zeros(10), 3, 2.0), "bce_with_logits", 1),
        bp.LabelError,
        "loss bce_with_logits: y: expected numbers in [0, 1]; got 2.0 at row 3",
    ),
    (
        (X, but(np.zeros(10), 3, 0.5), "focal", 1),
        bp.LabelError,
        "loss focal: y: expected 0 or 1; got 0.5 at row 3",
    ),
    (
        (X, but(np.ones(10), 3, 0.0), "hinge", 1),
        bp.LabelError,
        "loss hinge: y: expected -1 or +1 (for labels 0 and 1 pass 2*y - 1); got 0.0 at row 3",
    ),
    (
        (X, but(np.ones(10), 3, -1.0), "poisson", 1),
        bp.LabelError,
        "loss poisson: y: expected numbers ≥ 0; got -1.0 at row 3",
    ),
]


@pytest.mark.parametrize(("data", "kind", "message"), DATA, ids=[m[:70] for *_, m in DATA])
def test_fit_refuses_data(
    data: tuple[Any, Any, Any, int], kind: type[Exception], message: str, device: str
) -> None:
    X, y, loss, outputs = data
    model = bp.MLP([3, 4, outputs], norm="batch", device=device)
    before = {name: value.tobytes() for name, value in model.state_dict().items()}
    with pytest.raises(kind) as error:
        bp.fit(model, X, y, loss=loss, progress=False)
    assert str(error.value) == message
    assert {name: value.tobytes() for name, value in model.state_dict().items()} == before


def test_fit_refuses_ragged_lists() -> None:
    message = "fit: X: expected a rectangular array; setting an array element with a sequence"
    with pytest.raises(bp.ShapeError) as error:
        bp.fit(bp.MLP([3, 1], device="reference"), [[1, 2, 3], [1, 2]], [0, 0])
    assert str(error.value).startswith(message)


GOOD_X = {
    "float32": X.astype(np.float32).astype(np.float64),
    "whole numbers": np.arange(30).reshape(10, 3) % 7 - 3.0,
}
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "F order": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[None], (1, *a.shape))[0],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "float64": lambda a: a.astype(np.float64),
    "a list": lambda a: a.tolist(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_bits_of_its_c_copy(device: str, layout: str) -> None:
    plain = GOOD_X["float32"].astype(np.float32)
    given = LAYOUTS[layout](plain)
    if isinstance(given, np.ndarray):
        given.flags.writeable = False
    models = [bp.MLP([3, 8, 1], device=device) for _ in range(2)]
    for model, data in zip(models, (plain, given), strict=True):
        bp.fit(model, data, y, epochs=2, batch_size=4, progress=False)
    assert models[0].parameters.tobytes() == models[1].parameters.tobytes()
    assert models[0].predict(plain).tobytes() == models[0].predict(given).tobytes()


@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", "bool"])
def test_whole_numbers_and_truth_values_are_cast_once(device: str, kind: str) -> None:
    cells = np.abs(GOOD_X["whole numbers"]) if kind == "uint16" else GOOD_X["whole numbers"]
    cells = cells > 0 if kind == "bool" else cells
    model = bp.MLP([3, 8, 1], device=device)
    expected = model.predict(cells.astype(np.float32))
    assert model.predict(cells.astype(kind)).tobytes() == expected.tobytes()


def test_one_output_takes_a_column_or_a_vector(device: str) -> None:
    models = [bp.MLP([3, 8, 1], device=device) for _ in range(2)]
    for model, target in zip(models, (y, y[:, None]), strict=True):
        bp.fit(model, X, target, progress=False)
    assert models[0].parameters.tobytes() == models[1].parameters.tobytes()
