"""Muon: its step by hand, in float64, and what it leaves to others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.muon import orthogonal

rng = np.random.default_rng(0)
X, y = rng.standard_normal((24, 5)), rng.standard_normal((24, 2))


def network(device: str) -> bp.Sequential:
    return bp.MLP([5, 8, 3, 2], "tanh", dtype="float64", device=device)


def newton_schulz(M: Any) -> Any:
    """Line by line from Jordan's page."""
    X = M / np.linalg.norm(M)
    if tall := len(X) > len(X.T):
        X = X.T
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if tall else X


@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3), (1, 5)])
def test_singular_values_are_about_one(shape: tuple[int, int]) -> None:
    M = rng.standard_normal(shape) * 1e3
    U, _, V = np.linalg.svd(M, full_matrices=False)
    found = orthogonal(M)
    values = np.diag(U.T @ found @ V.T)  # the same directions
    np.testing.assert_allclose(U * values @ V, found, atol=1e-9)
    assert (values > 0.3).all() and (values < 1.3).all()


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_by_hand(device: str, nesterov: bool) -> None:
    model, twin = network(device), network(device)
    lr, mu, decay = 0.05, 0.9, 0.1
    rule = bp.Muon(lr, mu, nesterov, decay, others=bp.SGD(lr=0.2))
    step = bp.TrainStep(model, "mse", rule, batch_size=24)
    average: dict[str, Any] = {}
    for _ in range(3):
        _, gradients = bp.value_and_grad(twin, X, y)
        step(X, y)
        state = twin.state_dict()
        for name, g in gradients.items():
            if name in ("layers.0.weight", "layers.1.weight"):
                m = average[name] = mu * average.get(name, 0) + (1 - mu) * g
                mixed = (1 - mu) * g + mu * m if nesterov else m
                scale = max(1, g.shape[0] / g.shape[1]) ** 0.5
                state[name] = (1 - lr * decay) * state[name] - lr * scale * newton_schulz(mixed)
            else:
                state[name] = state[name] - 0.2 * g
        twin.load_state_dict(state)
        for name, value in state.items():
            np.testing.assert_allclose(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_a_step_that_is_not_finite_changes_nothing(device: str) -> None:
    model = bp.MLP([5, 8, 2], device=device)
    step = bp.TrainStep(model, "mse", bp.Muon(), batch_size=24)
    step(X, y)
    before = model.parameters.tobytes(), [s.tobytes() for s in step.state.values()]
    with pytest.raises(bp.NonFiniteError):
        step(X, y * 1e25)
    assert (model.parameters.tobytes(), [s.tobytes() for s in step.state.values()]) == before


def test_refusals() -> None:
    with pytest.raises(bp.OptionError, match="Muon: clip_norm: expected None"):
        bp.TrainStep(network("reference"), "mse", bp.Muon(), clip_norm=1.0)
    with pytest.raises(bp.OptionError, match="expected a hidden layer's matrix to train, got none"):
        bp.TrainStep(bp.MLP([5, 1]), "mse", bp.Muon())
    with pytest.raises(bp.OptionError, match=r"Muon: momentum: expected a number in \[0, 1\)"):
        bp.Muon(momentum=1.0)
    with pytest.raises(bp.KindError, match="Muon: others: expected an optimizer, got str"):
        bp.Muon(others="AdamW")  # type: ignore[arg-type]
