"""Metrics in batches against scikit-learn; eval sets; held-out shares; class weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.utils.class_weight import compute_class_weight

import backprop as bp
from backprop.evaluation import METRICS
from backprop.validation import DataSet, class_weights
from tests.inputs import on_host

EVALUATION = import_module("backprop.evaluation")
rng = np.random.default_rng(0)
ROWS = 61
X = rng.standard_normal((ROWS, 5))
binary = (rng.random(ROWS) < 0.3).astype(int)
ids = rng.integers(0, 3, ROWS)
numbers = rng.standard_normal((ROWS, 2)) * [1, 100] + [5, 1e6]
weight = rng.uniform(0, 3, ROWS)


@pytest.fixture(params=[7, 10_000], ids=["batches", "one batch"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in batches of 7, the last one short; or all at once."""
    monkeypatch.setattr(EVALUATION, "PREDICT_ROWS", request.param)


def evaluated(
    device: str, loss: Any, y: Any, outputs: int, names: list[Any], w: Any
) -> tuple[dict[str, float], Any]:
    """(what evaluate says, the model's outputs)."""
    model = bp.MLP([5, 16, outputs], "tanh", dtype="float64", device=device)
    model.parameters *= 3
    return bp.evaluate(model, X, y, loss, names, w), model


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("w", [None, weight], ids=["", "weighted"])
def test_binary_metrics_are_scikit_learns(device: str, w: Any) -> None:
    found, model = evaluated(
        device, "bce_with_logits", binary, 1, ["accuracy", "auc", "log_loss", "f1"], w
    )
    p = model.predict_proba(X)[:, 0]
    expected = {
        "loss": sk.log_loss(binary, p, sample_weight=w),
        "accuracy": sk.accuracy_score(binary, p > 0.5, sample_weight=w),
        "auc": sk.roc_auc_score(binary, p, sample_weight=w),
        "log_loss": sk.log_loss(binary, p, sample_weight=w),
        "f1": sk.f1_score(binary, p > 0.5, sample_weight=w),
    }
    assert found == pytest.approx(expected, rel=1e-12)
    hinge, _ = evaluated(device, "hinge", 2 * binary - 1, 1, ["accuracy", "auc", "f1"], w)
    assert all(
        hinge[name] == pytest.approx(expected[name], rel=1e-12) for name in hinge if name != "loss"
    )


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("w", [None, weight], ids=["", "weighted"])
def test_metrics_of_several_classes_are_scikit_learns(device: str, w: Any) -> None:
    names = ["accuracy", "auc", "log_loss", "f1"]
    found, model = evaluated(device, "cross_entropy", ids, 3, names, w)
    P = model.predict_proba(X)
    expected = {
        "loss": sk.log_loss(ids, P, sample_weight=w),
        "accuracy": sk.accuracy_score(ids, P.argmax(axis=1), sample_weight=w),
        "auc": sk.roc_auc_score(ids, P, multi_class="ovr", sample_weight=w),
        "log_loss": sk.log_loss(ids, P, sample_weight=w),
        "f1": sk.f1_score(ids, P.argmax(axis=1), average="macro", sample_weight=w),
    }
    assert found == pytest.approx(expected, rel=1e-12)
    one_hot, _ = evaluated(device, "cross_entropy", np.eye(3)[ids], 3, names, w)
    assert one_hot == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("w", [None, weight], ids=["", "weighted"])
def test_ignored_rows_do_not_count(device: str, w: Any) -> None:
    keep = np.arange(ROWS) >= 14  # two batches have no row that counts
    labels = np.where(keep, ids, -100)
    names = ["accuracy", "log_loss", "f1"]
    found, model = evaluated(device, "cross_entropy", labels, 3, names, w)
    part = None if w is None else w[keep]
    expected = bp.evaluate(model, X[keep], ids[keep], "cross_entropy", names, part)
    assert found == pytest.approx(expected, rel=1e-12)
    with pytest.raises(bp.DataError, match="accuracy: expected at least one row that counts"):
        evaluated(device, "cross_entropy", np.full(ROWS, -100), 3, ["accuracy"], None)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("w", [None, weight], ids=["", "weighted"])
def test_metrics_of_numbers_are_scikit_learns(device: str, w: Any) -> None:
    """Targets far from 0, where a sum of squares would lose the variance."""
    found, model = evaluated(device, "mse", numbers, 2, ["mae", "rmse", "r2"], w)
    predicted = model.predict(X)
    expected = {
        "loss": sk.mean_squared_error(numbers, predicted, sample_weight=w),
        "mae": sk.mean_absolute_error(numbers, predicted, sample_weight=w),
        "rmse": sk.root_mean_squared_error(numbers, predicted, sample_weight=w),
        "r2": sk.r2_score(numbers, predicted, sample_weight=w),
    }
    assert found == pytest.approx(expected, rel=1e-11)
    near = predicted + 0.01 * (numbers - numbers.mean(axis=0))
    found = bp.evaluate(model, X, near, "mse", ["r2"], w)
    assert found["r2"] == pytest.approx(sk.r2_score(near, predicted, sample_weight=w), rel=1e-9)


@pytest.mark.usefixtures("parts")
def test_r2_of_a_constant_target(device: str) -> None:
    model = bp.MLP([5, 1], dtype="float64", device=device)
    assert bp.evaluate(model, X, np.ones(ROWS), "mse", "r2")["r2"] == 0
    model.parameters[:] = 0
    assert bp.evaluate(model, X, np.zeros(ROWS), "mse", "r2")["r2"] == 1


@pytest.mark.usefixtures("parts")
def test_other_losses_predict_their_mean(device: str) -> None:
    counts = rng.poisson(2, ROWS)
    found, model = evaluated(device, "poisson", counts, 1, ["mae"], None)
    assert found["mae"] == pytest.approx(np.abs(counts - np.exp(model.predict(X)[:, 0])).mean())
    found, model = evaluated(device, "gaussian_nll", numbers[:, :1], 2, ["mae"], None)
    assert found["mae"] == pytest.approx(np.abs(numbers[:, 0] - model.predict(X)[:, 0]).mean())


@pytest.mark.usefixtures("parts")
def test_a_function_is_a_metric_of_all_rows(device: str) -> None:
    def worst(y: Any, predicted: Any) -> float:
        assert y.shape == predicted.shape == (ROWS, 2)
        return float(np.abs(y - predicted).max())

    found, model = evaluated(device, "mse", numbers, 2, [worst, "mae"], None)
    assert list(found) == ["loss", "worst", "mae"]
    assert found["worst"] == pytest.approx(np.abs(numbers - model.predict(X)).max())


def test_named_sets_and_metrics_are_in_the_history(device: str) -> None:
    model = bp.MLP([5, 8, 1], dtype="float64", device=device)
    history = bp.fit(
        model, X, binary, "bce_with_logits", epochs=2, progress=False, metrics=["auc", "f1"],
        eval_set={"train": (X, binary), "late": (X[:20], binary[:20], weight[:20])},
    )  # fmt: skip
    names = [f"{s}_{m}" for s in ("train", "late") for m in ("loss", "auc", "f1")]
    assert list(history) == ["loss", "lr", *names, "seconds"] and history.epochs == 2
    last = bp.evaluate(model, X[:20], binary[:20], "bce_with_logits", ["auc", "f1"], weight[:20])
    assert {m: history[f"late_{m}"][-1] for m in last} == pytest.approx(last, rel=1e-12)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.99])
def test_held_out_share_keeps_the_classes_in_proportion(fraction: float) -> None:
    labels = np.repeat([0, 1, 2, 3], [1000, 100, 10, 1])
    data = DataSet([np.arange(len(labels))[:, None], labels])
    rest, held = data.split(fraction, bp.Loss("cross_entropy"), 0)
    assert len(held) == round(fraction * len(labels))
    together = np.concatenate([rest.columns[0], held.columns[0]])[:, 0]
    assert np.array_equal(np.sort(together), np.arange(len(labels)))
    for c, count in enumerate([1000, 100, 10, 1]):
        taken = int((held.columns[1] == c).sum())
        # One row is rounding; two more may stand in for classes that keep their last row.
        assert abs(taken - fraction * count) < 3 and taken < count, (c, taken)
    same, other = (data.split(fraction, bp.Loss("cross_entropy"), seed)[1] for seed in (0, 1))
    assert np.array_equal(same.columns[0], held.columns[0])
    assert not np.array_equal(other.columns[0], held.columns[0])


def test_the_largest_share_below_one_leaves_a_row() -> None:
    labels = np.repeat([0, 1, 2], [9, 3, 1])
    data = DataSet([np.arange(13)[:, None], labels])
    rest, held = data.split(float(np.nextafter(1, 0)), bp.Loss("cross_entropy"), 0)
    assert (len(rest), len(held)) == (1, 12)


def test_balanced_weights_leave_ignored_rows_out() -> None:
    labels = np.array([0, 0, 0, 1, -100])
    found = class_weights(labels, "balanced", bp.Loss("cross_entropy"), "fit")
    np.testing.assert_allclose(found[:4], [4 / 6, 4 / 6, 4 / 6, 2])


def test_classes_that_are_not_named_weigh_one() -> None:
    found = class_weights(ids, {1: 5.0}, bp.Loss("cross_entropy"), "fit")
    np.testing.assert_array_equal(found, np.where(ids == 1, 5.0, 1.0))


def test_validation_fraction_is_a_fit_on_the_rest(device: str) -> None:
    one, other = (bp.MLP([5, 8, 3], dtype="float64", device=device) for _ in range(2))
    options: Any = {"epochs": 3, "progress": False, "metrics": ["accuracy"]}
    split = bp.fit(
        one, X, ids, "cross_entropy", sample_weight=weight, validation_fraction=0.25, seed=4,
        **options,
    )  # fmt: skip
    rest, held = DataSet([X, ids, weight]).split(0.25, bp.Loss("cross_entropy"), 4)
    whole = bp.fit(
        other, *rest.columns[:2], "cross_entropy", sample_weight=rest.columns[2],
        eval_set=held.columns, seed=4, **options,
    )  # fmt: skip
    del split["seconds"], whole["seconds"]
    assert split == whole and one.parameters.tobytes() == other.parameters.tobytes()


@pytest.mark.parametrize("loss", ["bce_with_logits", "hinge", "cross_entropy"])
def test_balanced_is_scikit_learns_and_multiplies_sample_weights(device: str, loss: str) -> None:
    y = {"bce_with_logits": binary, "hinge": 2 * binary - 1, "cross_entropy": ids}[loss]
    classes = np.unique(y)
    by_class = dict(
        zip(classes, compute_class_weight("balanced", classes=classes, y=y), strict=True)
    )
    outputs = 3 if loss == "cross_entropy" else 1
    models = [bp.MLP([5, 8, outputs], dtype="float64", device=device) for _ in range(4)]
    options: Any = {"progress": False, "epochs": 2}
    bp.fit(models[0], X, y, loss, class_weight="balanced", sample_weight=weight, **options)
    bp.fit(models[1], X, y, loss, class_weight=by_class, sample_weight=weight, **options)
    bp.fit(
        models[2], X, y, loss, class_weight=[by_class[c] for c in classes], sample_weight=weight,
        **options,
    )  # fmt: skip
    rows = weight * np.array([by_class[c] for c in y])
    bp.fit(models[3], X, y, loss, sample_weight=rows, **options)
    for model in models[:3]:
        np.testing.assert_allclose(on_host(model), on_host(models[3]), rtol=1e-12, atol=1e-15)


def test_class_weight_is_the_loss_option_of_that_name(device: str) -> None:
    """Cross entropy has weights of its own, and they mean the same."""
    one, other = (bp.MLP([5, 8, 3], dtype="float64", device=device) for _ in range(2))
    by_class = [0.5, 2.0, 4.0]
    bp.fit(one, X, ids, "cross_entropy", class_weight=by_class, progress=False)
    bp.fit(other, X, ids, bp.Loss("cross_entropy", class_weight=by_class), progress=False)
    np.testing.assert_allclose(on_host(one), on_host(other), rtol=1e-10, atol=1e-13)


def fit(**options: Any) -> bp.History:
    model = bp.MLP([5, 8, 1], device="reference")
    return bp.fit(model, X, binary, **{"loss": "bce_with_logits", "progress": False, **options})


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: fit(metrics=["precision"]),
        bp.OptionError,
        f"fit: metrics: expected one of {', '.join(METRICS)}; got 'precision'",
    ),
    (
        lambda: fit(metrics=["r2"]),
        bp.OptionError,
        "fit: metrics: expected one of accuracy, auc, log_loss, f1 with loss bce_with_logits; got "
        "'r2'",
    ),
    (
        lambda: fit(metrics=[3]),
        bp.KindError,
        "fit: metrics: expected names or functions of (y, predictions), got int",
    ),
    (
        lambda: fit(eval_set={"a": X}),
        bp.KindError,
        "fit: eval_set['a']: expected (X, y) or (X, y, sample_weight), got ndarray",
    ),
    (
        lambda: fit(eval_set={"a": (X[:, :4], binary)}),
        bp.ShapeError,
        "fit: eval_set['a']: X: expected shape (batch, in_features=5), got (61, 4)",
    ),
    (
        lambda: fit(eval_set=(X, binary[:3])),
        bp.ShapeError,
        "fit: eval_set: loss bce_with_logits: y: expected shape (61, 1) or (61,), one row per row "
        "of X, got (3,)",
    ),
    (
        lambda: fit(eval_set=(X, binary), validation_fraction=0.1),
        bp.KindError,
        "fit: validation_fraction: expected either that or eval_set, got both",
    ),
    (
        lambda: fit(validation_fraction=1.0),
        bp.OptionError,
        "fit: validation_fraction: expected a number in (0, 1), got 1.0",
    ),
    (
        lambda: fit(class_weight="auto"),
        bp.OptionError,
        "fit: class_weight: expected \"balanced\" or weights by class, got 'auto'",
    ),
    (
        lambda: fit(class_weight={2: 1.0}),
        bp.OptionError,
        "fit: class_weight: expected classes of y (0.0, 1.0), got 2",
    ),
    (
        lambda: fit(class_weight=[1.0]),
        bp.OptionError,
        "fit: class_weight: expected 2 weights, one a class, got 1",
    ),
    (
        lambda: fit(loss="mse", class_weight="balanced"),
        bp.OptionError,
        "fit: class_weight: expected targets that are one class a row, in memory; got those of "
        "loss mse",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[m[:60] for *_, m in REFUSED])
def test_refusal(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
