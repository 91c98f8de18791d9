from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backprop_kernels import reference
from backprop_kernels.arrays import Array
from backprop_kernels.errors import LabelError
from backprop_kernels.losses import LOSSES

from tests import oracles
from tests.guarded import Guards
from tests.tolerances import FORMULA, assert_within, sum_bound, unit

CLASS_WEIGHT = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])
POS_WEIGHT = np.array([1.0, 4.0, 0.5, 2.0, 3.0, 0.0])
OUTPUTS = 6
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES),
    ("huber", {"delta": 0.25}),
    ("quantile", {"q": 0.9}),
    ("focal", {"alpha": 0.6, "gamma": 0.5}),
    ("focal", {"gamma": 0.0}),
    ("bce_with_logits", {"pos_weight": 3.0}),
    ("bce_with_logits", {"pos_weight": POS_WEIGHT}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"class_weight": CLASS_WEIGHT}),
    ("cross_entropy", {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.3, "ignore_index": 1}),
]
IDS = [f"{name}-{'-'.join(options) or 'defaults'}" for name, options in CASES]


def loss(
    backend: ModuleType, Z: Array, target: Array, name: str, options: Any = None,
    activation: str = "identity", weight: Array | None = None, phase: int = 0,
) -> tuple[float, Array, Array]:  # fmt: skip
    """The operator on guarded arrays."""
    guards = Guards(phase)
    out = (
        guards.output((), np.dtype(np.float64)),
        guards.output(Z.shape, Z.dtype),
        guards.output(Z.shape[1:], Z.dtype),
    )
    got = backend.loss(
        guards.input(Z), guards.input(target), name, options, activation, guards.input(weight),
        out=out,
    )  # fmt: skip
    guards.check()
    assert all(g is o for g, o in zip(got, out, strict=True))
    return float(out[0]), out[1], out[2]


def drawn(name: str, batch: int, outputs: int, dtype: np.dtype) -> tuple[Array, Array]:
    """Random Z and a target that the loss accepts."""
    rng = np.random.default_rng(batch)
    Z = rng.standard_normal((batch, outputs)).astype(dtype)
    per_row = outputs // 2 if name == "gaussian_nll" else outputs
    return Z, oracles.targets(LOSSES[name].targets, rng, batch, per_row, dtype)


def check_case(
    backend: ModuleType, dtype: np.dtype, batch: int, outputs: int, name: str,
    options: dict[str, Any], weighted: bool, dense: bool = False,
) -> None:  # fmt: skip
    Z, target = drawn(name, batch, outputs, dtype)
    if dense:
        target = np.random.default_rng(1).dirichlet(np.ones(outputs), batch).astype(dtype)
    weight = np.random.default_rng(2).random(batch).astype(dtype) if weighted else None
    value, dZ, db = loss(backend, Z, target, name, options, weight=weight, phase=batch % 2)

    w = np.ones(batch) if weight is None else weight.astype(np.float64)
    complete = {**LOSSES[name].options, **options}
    exact = oracles.loss(Z, target, name, complete, w)
    u, reach = unit(dtype), 1 + np.abs(Z).max()
    size = max(abs(exact), 1) * reach  # softmax and exp turn an error of z into a relative one
    assert abs(value - exact) <= (FORMULA + 2 * np.sqrt(batch * outputs)) * u * size

    wide_Z, wide_target = (a.astype(np.float64) if a.dtype.kind == "f" else a for a in (Z, target))
    _, exact_dZ, _ = reference.loss(wide_Z, wide_target, name, options, "identity", w)
    # One output's gradient is of order (1 + |t|), times the row's share of the mean.
    share = np.abs(exact_dZ).max(axis=1, keepdims=True) + w[:, None] / w.sum() / outputs
    assert_within(dZ, exact_dZ, FORMULA * u * reach**2 * share, f"dZ of {name}")
    stored = dZ.astype(np.float64)
    total, sizes = stored.sum(axis=0), np.abs(stored).sum(axis=0)
    assert_within(db, total, 2 * sum_bound(batch, sizes, total, dtype), f"db of {name}")


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_loss_agrees_with_an_independent_formula(
    backend: ModuleType, dtype: np.dtype, name: str, options: dict[str, Any], weighted: bool
) -> None:
    for batch in (1, 2, 17, 129):
        check_case(backend, dtype, batch, OUTPUTS, name, options, weighted)


@pytest.mark.parametrize("outputs", [2, 16, 34, 130])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_any_width(backend: ModuleType, dtype: np.dtype, name: str, outputs: int) -> None:
    check_case(backend, dtype, 33, outputs, name, {}, weighted=True)


@pytest.mark.parametrize("options", [o for n, o in CASES if n == "cross_entropy"])
def test_cross_entropy_of_class_probabilities(
    backend: ModuleType, dtype: np.dtype, options: dict[str, Any]
) -> None:
    for batch in (1, 17, 129):
        check_case(backend, dtype, batch, OUTPUTS, "cross_entropy", options, True, dense=True)


@pytest.mark.parametrize(
    ("activation", "name"),
    [("sigmoid", "mse"), ("tanh", "huber"), ("softplus", "poisson"), ("gelu", "log_cosh"),
     ("relu", "mae"), ("sin", "quantile"), ("exp", "poisson"), ("tanh", "gaussian_nll"),
     ("hardswish", "cross_entropy"), ("silu", "bce_with_logits"), ("sigmoid", "hinge")],
)  # fmt: skip
def test_output_activation_is_part_of_the_loss(
    backend: ModuleType, dtype: np.dtype, activation: str, name: str
) -> None:
    act, slope = oracles.ACTIVATIONS[activation]
    Z, target = drawn(name, 33, OUTPUTS, dtype)
    value, dZ, db = loss(backend, Z, target, name, None, activation)
    Y, w = act(Z.astype(np.float64)), np.ones(33)
    exact = oracles.loss(Y, target, name, LOSSES[name].options, w)
    u = unit(dtype)
    assert abs(value - exact) <= 4 * FORMULA * u * max(abs(exact), 1) * (1 + np.abs(Y).max())
    wide = target.astype(np.float64) if target.dtype.kind == "f" else target
    _, dY, _ = reference.loss(Y, wide, name)
    steepness = np.maximum(1, np.abs(slope(Z)))
    bound = 4 * FORMULA * u * (1 + np.abs(Y)) ** 2 * (np.abs(dY) + 1 / 33) * steepness
    assert_within(dZ, dY * slope(Z.astype(np.float64)), bound, f"{name} of {activation}")
    total, sizes = dZ.sum(axis=0, dtype=np.float64), np.abs(dZ).sum(axis=0, dtype=np.float64)
    assert_within(db, total, 2 * sum_bound(33, sizes, total, dtype), "db")


def test_whole_numbers_are_exact(backend: ModuleType, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    for batch in (1, 2, 8, 64, 256):
        for outputs in (1, 2, 16, 64):  # powers of two: the mean divides exactly
            Z, T = (rng.integers(-8, 9, (batch, outputs)).astype(dtype) for _ in range(2))
            value, dZ, db = loss(backend, Z, T, "mse", phase=outputs % 2)
            d = (Z - T).astype(np.int64)
            assert value == (d * d).sum() / (batch * outputs)
            assert np.array_equal(dZ, 2 * d / (batch * outputs))
            assert np.array_equal(db, 2 * d.sum(axis=0) / (batch * outputs))


@pytest.mark.parametrize("name", LOSSES)
def test_weight_two_counts_as_the_row_twice(
    backend: ModuleType, dtype: np.dtype, name: str
) -> None:
    Z, target = drawn(name, 9, OUTPUTS, dtype)
    weight = np.ones(9, dtype)
    weight[4] = 2
    value, dZ, db = loss(backend, Z, target, name, weight=weight)
    twice = np.insert(np.arange(9), 4, 4)
    value_twice, dZ_twice, db_twice = loss(backend, Z[twice], target[twice], name)
    close = {"rtol": 8 * np.finfo(dtype).eps, "atol": np.finfo(dtype).eps}
    np.testing.assert_allclose(value, value_twice, **close)
    np.testing.assert_allclose(dZ[4], 2 * dZ_twice[4], **close)
    np.testing.assert_allclose(np.delete(dZ, 4, 0), np.delete(dZ_twice, [4, 5], 0), **close)
    np.testing.assert_allclose(db, db_twice, **close)


def test_label_errors_name_value_row_and_count(backend: ModuleType, dtype: np.dtype) -> None:
    Z = np.zeros((4, 3), dtype)
    for ids, message in (
        ([0, 3, 1, 7], "got 3 at row 1 (2 such row(s))"),
        ([0, 1, 2, -1], "got -1 at row 3 (1 such row(s))"),
        ([-100, -101, 0, 0], "got -101 at row 1 (1 such row(s))"),
    ):
        with pytest.raises(LabelError) as error:
            backend.loss(Z, np.array(ids), "cross_entropy")
        expected = f"loss cross_entropy: target: expected class ids 0 … 2, {message}"
        assert str(error.value) == expected


def test_huge_unsigned_id_is_no_ignored_one(backend: ModuleType, dtype: np.dtype) -> None:
    """2⁶⁴ − 100 has the bits of −100."""
    ids = np.array([0, 2**64 - 100], np.uint64)
    with pytest.raises(LabelError, match=rf"got {2**64 - 100} at row 1 \(1 such row"):
        backend.loss(np.zeros((2, 3), dtype), ids, "cross_entropy")


@pytest.mark.parametrize("ids", ["int64", "int32", "int16", "uint8"])
def test_any_integer_dtype_of_class_ids(backend: ModuleType, dtype: np.dtype, ids: str) -> None:
    Z, target = drawn("cross_entropy", 17, 5, dtype)
    expected = loss(backend, Z, target, "cross_entropy")
    got = loss(backend, Z, target.astype(ids), "cross_entropy")
    assert got[0] == expected[0] and np.array_equal(got[1], expected[1])


def test_ignored_rows_count_for_nothing(backend: ModuleType, dtype: np.dtype) -> None:
    Z, target = drawn("cross_entropy", 17, 5, dtype)
    ignored = np.array([0, 3, 16])
    target[ignored] = -100
    Z[3] = np.nan  # not even a NaN
    value, dZ, _ = loss(backend, Z, target, "cross_entropy")
    kept = np.delete(np.arange(17), ignored)
    alone, dZ_alone, _ = loss(backend, Z[kept], target[kept], "cross_entropy")
    close = {"rtol": 8 * np.finfo(dtype).eps, "atol": 0}
    np.testing.assert_allclose(value, alone, **close)
    np.testing.assert_allclose(dZ[kept], dZ_alone, **close)
    assert (dZ[ignored] == 0).all()


def test_nothing_to_learn_from_gives_exact_zeros(backend: ModuleType, dtype: np.dtype) -> None:
    Z = np.random.default_rng(0).standard_normal((5, 4)).astype(dtype)
    all_ignored = np.full(5, -100)
    value, dZ, db = loss(backend, Z, all_ignored, "cross_entropy")
    assert value == 0.0 and not dZ.any() and not db.any()
    of_class_without_weight = {"class_weight": np.array([1.0, 1.0, 0.0, 1.0])}
    value, dZ, db = loss(backend, Z, np.full(5, 2), "cross_entropy", of_class_without_weight)
    assert value == 0.0 and not dZ.any() and not db.any()


@pytest.mark.parametrize("name", LOSSES)
def test_zero_weights_and_empty_batches_give_exact_zeros(
    backend: ModuleType, dtype: np.dtype, name: str
) -> None:
    Z, target = drawn(name, 5, OUTPUTS, dtype)
    Z[2] = np.inf
    value, dZ, db = loss(backend, Z, target, name, weight=np.zeros(5, dtype))
    assert value == 0.0 and not dZ.any() and not db.any()
    value, dZ, db = loss(backend, Z[:0], target[:0], name)
    assert value == 0.0 and dZ.shape == (0, OUTPUTS) and not db.any()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_makes_the_loss_nan(backend: ModuleType, dtype: np.dtype, name: str) -> None:
    Z, target = drawn(name, 9, OUTPUTS, dtype)
    _, clean, _ = loss(backend, Z, target, name)
    Z[5, target[5] if target.ndim == 1 else 2] = np.nan
    value, dZ, _ = loss(backend, Z, target, name)
    assert np.isnan(value)
    assert np.array_equal(np.delete(dZ, 5, axis=0), np.delete(clean, 5, axis=0))


@pytest.mark.parametrize("scale", [1e4, 1e20, 5e37])  # a row's four values sum to 2e38
@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits", "focal", "log_cosh", "huber"])
def test_huge_outputs_give_finite_losses(
    backend: ModuleType, dtype: np.dtype, name: str, scale: float
) -> None:
    Z = np.array([[1, -1, 0, 0.5], [-1, 1, 1, -1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype)
    Z = Z * dtype.type(scale)
    rng = np.random.default_rng(0)
    target = oracles.targets(LOSSES[name].targets, rng, 4, 4, dtype)
    value, dZ, db = loss(backend, Z, target, name)
    if name in ("log_cosh", "huber"):  # |z| less log 2, or less a half: nothing at this size
        exact = np.abs(Z, dtype=np.float64).mean()
        assert abs(value - exact) <= max(2 / scale, FORMULA * unit(dtype)) * exact
    elif name == "cross_entropy" or name == "bce_with_logits":
        w = np.ones(4)
        exact = oracles.loss(Z, target, name, LOSSES[name].options, w)
        assert abs(value - exact) <= 32 * unit(dtype) * max(exact, 1)
    assert np.isfinite(value) and np.isfinite(dZ).all() and np.isfinite(db).all()
    assert (np.abs(dZ) <= 1).all()


def test_probabilities_of_zero_cost_nothing_at_minus_infinity(
    backend: ModuleType, dtype: np.dtype
) -> None:
    Z = np.array([[0, -np.inf, 0]], dtype)
    value, dZ, _ = loss(backend, Z, np.array([0]), "cross_entropy")
    assert abs(value - np.log(2)) <= 4 * unit(dtype)
    assert np.array_equal(dZ, np.array([[-0.5, 0, 0.5]], dtype))
