"""L-BFGS against closed forms and SciPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import optimize
from sklearn.linear_model import LogisticRegression

import backprop as bp

rng = np.random.default_rng(0)
X = rng.standard_normal((80, 6)) * [1, 10, 0.1, 1, 1, 1]  # badly scaled on purpose
y = X @ rng.standard_normal(6) + 0.1 * rng.standard_normal(80)
labels = (y + 3 * rng.standard_normal(80) > 0).astype(int)


def linear(device: str, outputs: int = 1) -> bp.Sequential:
    return bp.Sequential([bp.Linear(6, outputs)], dtype="float64", device=device)


def test_ridge_regression_has_a_closed_form(device: str) -> None:
    model, l2 = linear(device), 0.3
    history = bp.minimize(model, X, y, l2=l2, tolerance=1e-9)
    A = np.column_stack([X, np.ones(80)])
    penalty = np.diag([l2] * 6 + [0.0])  # ∂/∂w of mean (Aw − y)² + l2/2 |w|²
    best = np.linalg.solve(2 * A.T @ A / 80 + penalty, 2 * A.T @ y / 80)
    state = model.state_dict()
    found = np.append(state["layers.0.weight"][0], state["layers.0.bias"])
    np.testing.assert_allclose(found, best, rtol=1e-6, atol=1e-7)
    assert history.epochs < 80
    value = ((A @ best - y) ** 2).mean() + l2 / 2 * (best[:6] ** 2).sum()
    assert history["loss"][-1] == pytest.approx(value, rel=1e-12)


def test_logistic_regression_is_scikit_learns(device: str) -> None:
    model, C = linear(device), 0.5
    weight = rng.uniform(0.5, 2, 80)
    total = weight.sum()
    bp.minimize(
        model, X, labels, "bce_with_logits", l2=1 / (C * total), tolerance=1e-9,
        sample_weight=weight,
    )  # fmt: skip
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(X, labels, weight)
    state = model.state_dict()
    np.testing.assert_allclose(state["layers.0.weight"], theirs.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state["layers.0.bias"], theirs.intercept_, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_gets_as_low_as_with_scipy(seed: int) -> None:
    Z = rng.standard_normal((80, 6))
    target = np.sin(Z[:, 0]) + Z[:, 1] * Z[:, 2]
    ours, theirs = (bp.MLP([6, 8, 1], "tanh", dtype="float64", seed=seed) for _ in range(2))

    def objective(flat: Any) -> tuple[float, Any]:
        theirs.parameters[:] = flat
        value, gradients = bp.value_and_grad(theirs, Z, target)
        arena = np.zeros_like(theirs.parameters)
        for name, view in theirs.layout.views(arena).items():
            view[...] = gradients[name]
        return value, arena

    start = theirs.parameters.copy()
    options = {"maxiter": 150, "maxcor": 10, "ftol": 0, "gtol": 1e-7}
    reference = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    history = bp.minimize(ours, Z, target, steps=150)
    assert history["loss"][-1] <= 1.5 * reference.fun + 1e-3
    assert all(np.diff(history["loss"]) <= 1e-12)  # a line search never climbs


def test_rosenbrock_is_solved() -> None:
    """The classic narrow valley, through the parts that know no network."""
    from backprop.lbfgs import Point, _direction, _search

    def objective(x: Any) -> tuple[float, Any]:
        return float(optimize.rosen(x)), optimize.rosen_der(x)

    x = np.array([-1.2, 1.0, -0.5, 0.8])
    point, pairs = Point(x, *objective(x)), []
    for _ in range(200):
        new = _search(objective, point, _direction(point.gradient, pairs), 1.0 if pairs else 1e-3)
        if new is None:
            break
        s, t = new.x - point.x, new.gradient - point.gradient
        # Strong Wolfe, as promised.
        assert new.value <= point.value + 1e-4 * new.length * point.slope + 1e-14
        assert abs(new.slope) <= -0.9 * point.slope + 1e-14
        pairs = [*pairs, (s, t, 1 / float(s @ t))][-10:]
        point = new
        if np.abs(point.gradient).max() < 1e-8:
            break
    np.testing.assert_allclose(point.x, 1, atol=1e-7)


def test_frozen_tensors_and_float32(device: str) -> None:
    model = bp.MLP([6, 4, 1], "tanh", device=device)
    model.freeze("layers.0")
    before = model.state_dict()
    history = bp.minimize(model, X, y, steps=50)
    after = model.state_dict()
    assert after["layers.0.weight"].tobytes() == before["layers.0.weight"].tobytes()
    assert after["layers.1.weight"].tobytes() != before["layers.1.weight"].tobytes()
    assert history["loss"][-1] < history["loss"][0]
    loss = bp.evaluate(model, X, y)["loss"]
    assert loss == pytest.approx(history["loss"][-1], rel=1e-4)


def test_a_penalty_leaves_frozen_weights_and_all_biases_alone(device: str) -> None:
    model = bp.MLP([6, 4, 1], "tanh", dtype="float64", device=device)
    model.freeze("layers.0")
    before = model.state_dict()
    bp.minimize(model, X, y, l2=1e6, steps=50)
    after = model.state_dict()
    assert after["layers.0.weight"].tobytes() == before["layers.0.weight"].tobytes()
    np.testing.assert_allclose(after["layers.1.weight"], 0, atol=1e-3)
    assert after["layers.1.bias"] == pytest.approx(y.mean(), rel=1e-3)


def test_it_ends_with_the_first_gradient_below_the_tolerance(device: str) -> None:
    def largest(steps: int) -> tuple[int, float]:
        model = linear(device)
        taken = bp.minimize(model, X, y, tolerance=1e-2, steps=steps).epochs
        return taken, max(abs(g).max() for g in bp.value_and_grad(model, X, y)[1].values())

    taken, gradient = largest(1000)
    assert gradient <= 1e-2 < largest(taken - 1)[1]


@pytest.mark.parametrize("bad", [{"steps": 0}, {"memory": 0}, {"l2": -1}, {"tolerance": "x"}])
def test_refusal(bad: dict[str, Any]) -> None:
    with pytest.raises(bp.OptionError, match=f"minimize: {next(iter(bad))}: expected"):
        bp.minimize(linear("reference"), X, y, **bad)
