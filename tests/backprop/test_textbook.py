"""The textbooks' networks, against the same networks written out by hand.  docs/textbook_*.md"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from docs.examples import chain_rule, learning_rate, xor


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def gradient_descent(
    weights: dict[str, np.ndarray], lr: float, steps: int
) -> tuple[dict[str, np.ndarray], float]:
    """The textbook's algorithm for 2-3-1 on XOR, one point and one neuron at a time."""
    W1, b1 = weights["layers.0.weight"].copy(), weights["layers.0.bias"].copy()
    W2, b2 = weights["layers.1.weight"].copy(), weights["layers.1.bias"].copy()
    points = len(xor.X)
    for _ in range(steps):
        loss = 0.0
        dW1, db1, dW2, db2 = (np.zeros_like(w) for w in (W1, b1, W2, b2))
        for x, t in zip(xor.X, xor.y, strict=True):
            hidden = [sigmoid(W1[j, 0] * x[0] + W1[j, 1] * x[1] + b1[j]) for j in range(3)]
            out = sigmoid(sum(W2[0, j] * hidden[j] for j in range(3)) + b2[0])
            loss += (out - t) ** 2 / points
            delta = 2 * (out - t) / points * out * (1 - out)
            db2[0] += delta
            for j in range(3):
                dW2[0, j] += delta * hidden[j]
                delta_hidden = delta * W2[0, j] * hidden[j] * (1 - hidden[j])
                db1[j] += delta_hidden
                for i in range(2):
                    dW1[j, i] += delta_hidden * x[i]
        for w, dw in ((W1, dW1), (b1, db1), (W2, dW2), (b2, db2)):
            w -= lr * dw
    return dict(zip(weights, (W1, b1, W2, b2), strict=True)), loss


def test_xor_training_is_the_textbooks_algorithm(device: str) -> None:
    model = xor.network(device, seed=3)
    expected, expected_loss = gradient_descent(model.state_dict(), lr=5.0, steps=100)
    step = bp.TrainStep(model, loss="mse", optimizer=bp.SGD(lr=5.0), batch_size=4)
    loss = [step(xor.X, xor.y) for _ in range(100)][-1]
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("seed", range(10))
def test_xor_is_learnt_from_any_start(seed: int) -> None:
    model = xor.network(seed=seed)
    losses = xor.train(model)
    assert losses[0] > 0.24
    assert losses[-1] < 1e-3
    np.testing.assert_allclose(model.predict(xor.X)[:, 0], xor.y, atol=0.05)


def test_xor_is_not_learnt_without_the_hidden_layer(device: str) -> None:
    layers = [bp.Linear(2, 1, activation="sigmoid")]
    model = bp.Sequential(layers, dtype="float64", device=device)
    losses = xor.train(model)
    assert losses[-1] == pytest.approx(0.25, abs=1e-9)
    np.testing.assert_allclose(model.predict(xor.X), 0.5, atol=1e-4)


def test_each_partial_derivative_is_the_product_of_its_factors(device: str) -> None:
    model = chain_rule.network(device)
    loss, gradients = bp.value_and_grad(model, chain_rule.X, chain_rule.y, loss="mse")
    output = sigmoid(
        0.9 * sigmoid(0.6 - 0.5 + 0.1)
        - 0.7 * sigmoid(0.4 + 0.7 - 0.2)
        + 0.5 * sigmoid(-0.8 + 0.3 + 0.4)
        - 0.3
    )
    assert loss == pytest.approx(output**2, rel=1e-14)
    seen = set()
    for tensor, index, dL_da, da_dz, dz_dw in chain_rule.factors():
        seen.add((tensor, index))
        assert gradients[tensor][index] == pytest.approx(dL_da * da_dz * dz_dw, rel=1e-14)
    assert seen == {(name, i) for name, g in gradients.items() for i in np.ndindex(g.shape)}
    assert len(seen) == 13


def test_each_partial_derivative_is_the_slope_of_a_nudge(device: str) -> None:
    model = chain_rule.network(device)
    _, gradients = bp.value_and_grad(model, chain_rule.X, chain_rule.y, loss="mse")
    for tensor, index, *_ in chain_rule.factors():
        slope = chain_rule.nudged(model, tensor, index)
        assert slope == pytest.approx(gradients[tensor][index], rel=0, abs=2e-10), (tensor, index)
    for name, value in model.state_dict().items():
        assert (value == np.array(chain_rule.WEIGHTS[name])).all(), "the nudges are undone"


@pytest.mark.parametrize("lr", learning_rate.RATES)
def test_a_step_is_the_learning_rate_times_the_gradient(lr: float, device: str) -> None:
    path, losses = learning_rate.trajectory(lr, 1, device)
    model = xor.network(device)
    loss, gradients = bp.value_and_grad(model, learning_rate.X, learning_rate.y, loss="mse")
    slope = np.concatenate([gradients[f"layers.{i}.weight"].ravel() for i in range(2)])
    assert losses[0] == loss
    np.testing.assert_allclose(path[1] - path[0], -lr * slope, rtol=1e-12, atol=1e-15)
    assert (slope != 0).all()


def test_learning_rates_walk_one_path_at_their_own_speed() -> None:
    runs = {lr: learning_rate.trajectory(lr) for lr in learning_rate.RATES}
    slow, middle, fast = (runs[lr][0] for lr in learning_rate.RATES)
    assert 2e-4 < np.abs(fast[20] - middle[200]).max() < 6e-4
    assert 2e-5 < np.abs(middle[200] - slow[2000]).max() < 7e-5
    assert np.abs(slow[2000] - slow[0]).max() < 0.19
    losses = runs[1.0][1]
    assert losses[500] > 0.2 and losses[1200] < 0.025


def test_the_picture_shows_the_trajectories(tmp_path: Path) -> None:
    path = np.linspace(0.0, 1.0, 27).reshape(3, 9)
    pictures = []
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", -1.0)):
        learning_rate.draw({0.1: path, 1.0: scale * path}, str(tmp_path / f"{name}.png"))
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG\r\n")
    assert pictures[0] == pictures[1] != pictures[2]
