"""The estimators: scikit-learn's own checks, and its numbers from the same initial weights."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from sklearn import datasets, linear_model, neural_network
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neural_network import _multilayer_perceptron
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import backprop as bp
from backprop.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

rng = np.random.default_rng(0)
X = rng.standard_normal((60, 4))
ids = rng.permutation(np.arange(60) % 3)
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 30, "random_state": 0}


@parametrize_with_checks([MLPClassifier(max_iter=100), MLPRegressor(max_iter=100)])
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("estimator", [MLPClassifier, MLPRegressor])
def test_weights_are_repetitions(estimator: Any) -> None:
    weight = np.random.default_rng(1).integers(0, 4, 60)
    made = [estimator(**{**SMALL, "solver": "lbfgs", "alpha": 0.1}) for _ in range(2)]
    weighted = made[0].fit(X, ids, sample_weight=weight)
    repeated = made[1].fit(np.repeat(X, weight, axis=0), np.repeat(ids, weight))
    for ours, theirs in zip(weighted.coefs_, repeated.coefs_, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.fixture
def same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """scikit-learn's networks begin with the parameters put here: weights and biases by layer."""
    start: list[Any] = []
    monkeypatch.setattr(
        _multilayer_perceptron.BaseMultilayerPerceptron,
        "_init_coef",
        lambda self, fan_in, fan_out, dtype: tuple(part.copy() for part in start.pop(0)),
    )
    yield start


TARGETS = {
    "three classes": (MLPClassifier, ids),
    "two classes": (MLPClassifier, ids > 0),
    "labels": (MLPClassifier, np.stack([ids > 0, ids == 1], axis=1).astype(int)),
    "number": (MLPRegressor, X[:, 0] * X[:, 1]),
    "numbers": (MLPRegressor, X[:, :3] ** 2),
    "counts": (MLPRegressor, ids),
}
SOLVERS = {
    "adam": {"solver": "adam", "epsilon": 1e-14},  # theirs stands elsewhere in the formula
    "sgd": {"solver": "sgd", "learning_rate_init": 0.05},
    "plain sgd": {"solver": "sgd", "learning_rate_init": 0.05, "momentum": 0},
    "momentum": {"solver": "sgd", "learning_rate_init": 0.05, "nesterovs_momentum": False},
    "falling": {
        "solver": "sgd", "learning_rate_init": 0.5, "momentum": 0, "learning_rate": "invscaling",
    },
}  # fmt: skip


def pair(target: str, start: list[Any], **options: Any) -> tuple[Any, Any]:
    """Ours and scikit-learn's, fitted from the same initial weights on the same batches."""
    kind, y = TARGETS[target]
    options = {"shuffle": False, "random_state": 0, "hidden_layer_sizes": (8, 5), **options}
    options |= {"loss": "poisson"} if target == "counts" else {}
    still = {"max_iter": 1, "solver": "adam", "learning_rate": "constant", "learning_rate_init": 0}
    first = kind(**{**options, **still}).fit(X, y)
    start += [(W.copy(), b.copy()) for W, b in zip(first.coefs_, first.intercepts_, strict=True)]
    ours = kind(**options).fit(X, y)
    theirs = getattr(neural_network, kind.__name__)(**options).fit(X, y)
    assert not start
    return ours, theirs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("target", TARGETS)
def test_from_the_same_start_come_the_same_numbers(
    target: str, solver: str, same_start: list[Any]
) -> None:
    options = {"max_iter": 6, "batch_size": 20, "alpha": 0.3, "activation": "tanh"}
    ours, theirs = pair(target, same_start, **options, **SOLVERS[solver])
    for mine, other in zip(ours.coefs_, theirs.coefs_, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-11)
    for mine, other in zip(ours.intercepts_, theirs.intercepts_, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-9)
    if hasattr(theirs, "classes_"):
        np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-9)
        np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    for name in ("n_iter_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_", "t_"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_epsilon_is_weighed_against_scikit_learns_gradient() -> None:
    """Which is half of that of the mean square."""
    ours = MLPRegressor(**SMALL, epsilon=0.1, alpha=0.0, shuffle=False).fit(X, X[:, 0])
    model = bp.MLP([4, 8, 1], dtype="float64", seed=ours._seed)
    rule = bp.Adam(lr=1e-3, eps=0.2)
    bp.fit(model, X, X[:, 0], "mse", rule, 30, 60, shuffle=False, progress=False)
    np.testing.assert_array_equal(ours.coefs_[0], model.state_dict()["layers.0.weight"].T)


@pytest.mark.parametrize("rate", ["constant", "adaptive"])
def test_training_ends_when_scikit_learns_does(rate: str, same_start: list[Any]) -> None:
    options = {"alpha": 0.0, "batch_size": 30, "tol": 3e-3, "n_iter_no_change": 3, "momentum": 0}
    ours, theirs = pair("number", same_start, solver="sgd", learning_rate_init=0.1,
                        learning_rate=rate, max_iter=400, **options)  # fmt: skip
    assert ours.n_iter_ == theirs.n_iter_ < 400
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)
    assert ours.loss_ == pytest.approx(theirs.loss_)
    assert ours.best_loss_ == pytest.approx(theirs.best_loss_)


@pytest.mark.parametrize("target", TARGETS)
def test_lbfgs_finds_the_minimum(target: str) -> None:
    """Ridge regression's is exact; scikit-learn's own search ends 3 digits before it."""
    kind, y = TARGETS[target]
    options = {"solver": "lbfgs", "hidden_layer_sizes": (), "alpha": 0.5, "tol": 1e-8,
               "max_iter": 1000, "loss": "poisson" if target == "counts" else None}  # fmt: skip
    weight = np.random.default_rng(1).uniform(0.5, 2, 60)
    ours = kind(**options).fit(X, y, sample_weight=weight)
    if target.startswith("number"):
        best = linear_model.Ridge(0.5, solver="cholesky").fit(X, y, weight)
        np.testing.assert_allclose(ours.predict(X), best.predict(X), rtol=1e-5, atol=1e-6)
        return
    if kind is MLPClassifier:
        del options["loss"]  # which theirs has not
    theirs = getattr(neural_network, kind.__name__)(**options).fit(X, y, weight)
    found, expected = (
        m.predict_proba(X) if kind is MLPClassifier else m.predict(X) for m in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_as_accurate_as_scikit_learn() -> None:
    """Means over three splits; single ones vary by 0.01 on the digits, by 0.1 on diabetes."""
    cases: list[tuple[Any, Any, float, dict[str, Any]]] = [
        (datasets.load_digits, MLPClassifier, 0.01, {"max_iter": 30}),
        (datasets.load_diabetes, MLPRegressor, 0.05, {"max_iter": 200, "alpha": 1.0}),
    ]
    for load, kind, margin, options in cases:
        data, target = load(return_X_y=True)
        scores = []
        for estimator in (kind, getattr(neural_network, kind.__name__)):
            found = [
                make_pipeline(
                    StandardScaler(),
                    estimator(random_state=s, learning_rate_init=0.01, **options),
                )
                .fit(*parts[::2])
                .score(*parts[1::2])
                for s in range(3)
                for parts in [train_test_split(data, target, random_state=s)]
            ]
            scores.append(np.mean(found))
        assert scores[0] > scores[1] - margin, kind.__name__


@pytest.mark.parametrize("names", [["no", "yes"], ["a", "b", "c"], [3.0, 7.0], [-5, 0, 9]])
def test_classes_of_any_kind(names: list[Any]) -> None:
    y = np.array(names)[ids % len(names)]
    model = MLPClassifier(**{**SMALL, "max_iter": 200, "learning_rate_init": 0.03}).fit(X, y)
    assert model.classes_.tolist() == sorted(names)
    assert set(model.predict(X)) <= set(names) and model.score(X, y) > 0.75
    P = model.predict_proba(X)
    assert P.shape == (60, len(names))
    np.testing.assert_allclose(P.sum(axis=1), 1)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(P))
    np.testing.assert_array_equal(model.classes_[P.argmax(axis=1)], model.predict(X))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_network_has_the_dtype_of_the_data(dtype: str) -> None:
    model = MLPRegressor(**SMALL).fit(X.astype(dtype), ids)
    assert model.predict(X.astype(dtype)).dtype == dtype == str(model.model_.dtype)


def test_the_same_on_every_backend(device: str) -> None:
    models = [MLPClassifier(**SMALL, device=name).fit(X, ids) for name in ("reference", device)]
    np.testing.assert_allclose(*(m.predict_proba(X) for m in models), rtol=1e-8)
    np.testing.assert_allclose(*(m.coefs_[1] for m in models), rtol=1e-6, atol=1e-9)


def test_coefficients_are_views() -> None:
    model = MLPRegressor(**SMALL).fit(X, ids)
    assert [W.shape for W in model.coefs_] == [(4, 8), (8, 1)]
    model.coefs_[1][...] = 0
    model.intercepts_[1][...] = 3
    assert (model.predict(X) == 3).all()


@pytest.mark.parametrize("shuffle", [False, True], ids=["", "shuffled"])
@pytest.mark.parametrize("first", ["fit", "partial_fit"])
def test_partial_fits_are_the_epochs_of_a_fit(first: str, shuffle: bool) -> None:
    options = {**SMALL, "shuffle": shuffle, "batch_size": 20, "n_iter_no_change": 100}
    whole = MLPClassifier(**{**options, "max_iter": 8}).fit(X, ids)
    parts = MLPClassifier(**{**options, "max_iter": 3})
    parts = parts.fit(X, ids) if first == "fit" else parts
    while not hasattr(parts, "loss_curve_") or len(parts.loss_curve_) < 8:
        parts = pickle.loads(pickle.dumps(parts.partial_fit(X, ids, classes=[0, 1, 2])))
    np.testing.assert_allclose(parts.loss_curve_, whole.loss_curve_, rtol=1e-12)
    np.testing.assert_allclose(parts.coefs_[0], whole.coefs_[0], rtol=1e-9)


def test_partial_fit_needs_all_classes_at_first_and_may_see_few() -> None:
    model = MLPClassifier(**SMALL)
    model.partial_fit(X[ids < 2], ids[ids < 2], classes=[3, 1, 0, 2])
    model.partial_fit(X, ids)
    assert model.classes_.tolist() == [0, 1, 2, 3]
    assert model.predict_proba(X).shape == (60, 4) and model.t_ == 100
    with pytest.raises(bp.LabelError, match=r"y: expected classes \[0 1 2 3\], got \[7\] too"):
        model.partial_fit(X, np.where(ids == 2, 7, ids))
    with pytest.raises(bp.OptionError, match="classes: expected those of all calls"):
        MLPClassifier().partial_fit(X, ids)


def test_warm_start_goes_on() -> None:
    model = MLPRegressor(**SMALL, warm_start=True).fit(X, ids)
    before, curve = model.coefs_[0].copy(), list(model.loss_curve_)
    model.set_params(max_iter=5).fit(X, ids)
    assert model.loss_curve_[:30] == curve and len(model.loss_curve_) == 35 and model.n_iter_ == 5
    assert model.loss_curve_[30] < curve[0] and not np.array_equal(before, model.coefs_[0])
    model.set_params(warm_start=False).fit(X, ids)
    assert model.loss_curve_[0] == curve[0]


def test_early_stopping_keeps_the_best_epoch_of_its_own_split_or_of_a_given_set() -> None:
    options = {**SMALL, "max_iter": 400, "early_stopping": True, "learning_rate_init": 0.02}
    model = MLPClassifier(**options, tol=0.0).fit(X, ids)
    assert model.n_iter_ == len(model.validation_scores_) < 400
    assert model.best_validation_score_ == max(model.validation_scores_)
    assert model.best_loss_ is None
    other = np.random.default_rng(1)
    held_out = other.standard_normal((40, 4)), other.integers(0, 3, 40)
    model = MLPClassifier(**options).fit(X, ids, eval_set=held_out)
    assert model.score(*held_out) == pytest.approx(model.best_validation_score_)
    assert set(model.history_) >= {"loss", "val_loss", "val_accuracy"}
    watched = MLPRegressor(**SMALL).fit(X, X[:, 0], eval_set=(X, X[:, 0]))
    assert watched.history_["val_r2"][-1] == pytest.approx(watched.score(X, X[:, 0]))


def test_class_weight_is_a_sample_weight() -> None:
    y = np.where(ids == 0, "rare", "common")
    weight = np.where(ids == 0, 5.0, 1.0)
    models = [
        MLPClassifier(**SMALL, class_weight={"rare": 5}).fit(X, y),
        MLPClassifier(**SMALL).fit(X, y, sample_weight=weight),
        MLPClassifier(**SMALL, class_weight={"rare": 5}).fit(X, y, sample_weight=weight),
        MLPClassifier(**SMALL).fit(X, y, sample_weight=weight**2),
    ]
    by_class, by_row, both, squared = (m.coefs_[0] for m in models)
    np.testing.assert_array_equal(by_class, by_row)
    np.testing.assert_array_equal(both, squared)
    assert not np.array_equal(by_row, both)
    assert MLPClassifier(**SMALL, class_weight="balanced").fit(X, y).n_outputs_ == 1


@pytest.mark.parametrize("solver", ["adamw", "lion", "rmsprop", "adagrad", bp.Muon(lr=0.02)])
def test_other_solvers_losses_and_schedules(solver: Any) -> None:
    model = MLPRegressor(
        (16, 16), "gelu", solver=solver, loss="huber", learning_rate="cosine", norm="layer",
        dropout=0.1, learning_rate_init=0.01, max_iter=40, random_state=0,
    ).fit(X, X[:, 0])  # fmt: skip
    assert model.loss_ < model.loss_curve_[0]
    assert model.history_["lr"][-1] < model.history_["lr"][0]


def test_pipelines_searches_clones_and_copies() -> None:
    search = GridSearchCV(
        make_pipeline(StandardScaler(), MLPClassifier(**SMALL)),
        {"mlpclassifier__alpha": [1e-4, 10.0], "mlpclassifier__solver": ["adam", "lbfgs"]},
        cv=3,
    ).fit(X, X[:, 0] > 0)
    assert search.best_score_ > 0.8
    assert len(cross_val_score(MLPRegressor(**SMALL), X, X[:, 0], cv=3)) == 3
    model = MLPClassifier(**SMALL, activation="logistic").fit(X, ids)
    again = pickle.loads(pickle.dumps(model))
    assert again.predict_proba(X).tobytes() == model.predict_proba(X).tobytes()
    assert clone(model).get_params() == model.get_params()
    assert not hasattr(clone(model), "coefs_")
    one, two = (clone(model).fit(X, ids) for _ in range(2))
    assert one.coefs_[0].tobytes() == two.coefs_[0].tobytes() == model.coefs_[0].tobytes()


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_no_convergence_is_said(solver: str) -> None:
    with pytest.warns(ConvergenceWarning, match="max_iter: 2 iterations were made"):
        MLPClassifier(max_iter=2, solver=solver).fit(X, ids)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("backprop.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(bp.MissingExtraError, match=r'pip install "fused-backprop\[sklearn\]"'):
        import_module("backprop.sklearn")


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: MLPClassifier(solver="ada").fit(X, ids),
     "MLPClassifier: solver: expected one of lbfgs, sgd, .*; got 'ada'"),
    (lambda: MLPClassifier(max_iter=0).fit(X, ids), "max_iter: expected an integer ≥ 1, got 0"),
    (lambda: MLPRegressor(alpha=-1).fit(X, ids), "MLPRegressor: alpha: expected a number ≥ 0"),
    (lambda: MLPRegressor(batch_size=0).fit(X, ids), "MLPRegressor: batch_size: expected an int"),
    (lambda: MLPRegressor(n_iter_no_change=0).fit(X, ids), "n_iter_no_change: expected an int"),
    (lambda: MLPRegressor(activation="rel").fit(X, ids), "activation: expected one of"),
    (lambda: MLPRegressor(class_weight="balanced").fit(X, ids),
     "MLPRegressor: class_weight: expected None; rows have sample_weight"),
    (lambda: MLPRegressor(loss="cross_entropy").fit(X, ids),
     "MLPRegressor: loss: expected one for numbers, got cross_entropy"),
    (lambda: MLPClassifier(loss="mse").fit(X, ids),
     "MLPClassifier: loss: expected cross_entropy.*got mse"),
    (lambda: MLPClassifier(loss="focal").fit(X, ids), "loss: expected cross_entropy.*got focal"),
    (lambda: MLPClassifier().fit(X, np.zeros(60)), "y: expected at least 2 classes, got 1 class"),
    (lambda: MLPClassifier().fit(X, np.stack([ids, ids], 1)), "y: expected one class a row"),
    (lambda: MLPClassifier(**SMALL).fit(X, ids, eval_set=(X, ids + 1)),
     r"eval_set: y: expected classes \[0 1 2\], got \[3\] too"),
    (lambda: MLPClassifier(solver="lbfgs").partial_fit(X, ids, classes=[0, 1, 2]),
     "partial_fit: solver: expected one of small batches, got 'lbfgs'"),
    (lambda: MLPClassifier(learning_rate="cosine").partial_fit(X, ids, classes=[0, 1, 2]),
     "partial_fit: learning_rate: expected 'constant', got 'cosine'"),
    (lambda: MLPRegressor().fit(X, ids, sample_weight=np.zeros(60)),
     "sample_weight: expected one above 0, got only zeros"),
    (lambda: MLPRegressor().fit(X, ids, sample_weight=-np.ones(60)),
     "MLPRegressor: sample_weight: expected weights ≥ 0, got -1"),
    (lambda: MLPClassifier(solver="lbfgs").fit(X, ids, eval_set=(X, ids)),
     "eval_set: expected None with solver lbfgs"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:60] for _, m in REFUSED])
def test_refusal(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((bp.OptionError, bp.LabelError), match=message):
        call()
