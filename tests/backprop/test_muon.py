"""Muon: its step by hand, in float64, and what it leaves to others."""

from __future__ import annotations

from pathlib import Path
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


def test_by_name(device: str) -> None:
    """As the other optimizers are, whatever the case of the letters."""
    models = [network(device) for _ in range(2)]
    for model, rule in zip(models, ("muon", bp.Muon()), strict=True):
        bp.fit(model, X, y, "mse", rule, epochs=2, batch_size=8, progress=False)
    assert models[0].parameters.tobytes() == models[1].parameters.tobytes()
    with pytest.raises(bp.OptionError, match=r"got L-BFGS: bp\.minimize"):
        bp.fit(models[0], X, y, "mse", "lbfgs", progress=False)
    with pytest.raises(bp.OptionError, match=r"expected one of sgd, .*, muon; got 'moon'"):
        bp.fit(models[0], X, y, "mse", "moon", progress=False)


def test_a_schedule_scales_both_rates(device: str) -> None:
    scheduled, halved = network(device), network(device)
    whole = bp.Muon(lr=0.02, others=bp.AdamW(lr=0.01))
    half = bp.Muon(lr=0.01, others=bp.AdamW(lr=0.005))
    bp.fit(scheduled, X, y, "mse", whole, batch_size=24, progress=False, schedule=lambda t: 0.5)
    bp.fit(halved, X, y, "mse", half, batch_size=24, progress=False)
    for name, value in scheduled.state_dict().items():
        np.testing.assert_array_equal(value, halved.state_dict()[name])


def test_frozen_and_named_matrices(device: str) -> None:
    model = network(device)
    model.freeze("layers.0")
    before = model.state_dict()
    rule = bp.Muon(lr=0.1, weight_decay=0.5, matrices="*.weight", others=bp.SGD(lr=0.0))
    bp.fit(model, X, y, "mse", rule, batch_size=24, progress=False)
    moved = [n for n, value in model.state_dict().items() if not np.array_equal(value, before[n])]
    assert moved == ["layers.1.weight", "layers.2.weight"]


def test_a_resumed_fit_has_both_rates_and_refuses_other_options(tmp_path: Path) -> None:
    """Bit for bit at every event: test_resume.py."""

    def lower(epoch: int, history: bp.History) -> None:
        rule.lr, rule.others.lr = rule.lr / 2, rule.others.lr / 3

    def train(folder: str, epochs: int, **options: Any) -> Any:
        nonlocal rule
        rule = bp.Muon(lr=0.04, others=bp.AdamW(lr=0.03), **options)
        model = network("reference")
        bp.fit(model, X, y, "mse", rule, epochs, 8, callbacks=[lower], progress=False,
               checkpoint=tmp_path / folder, resume=True)  # fmt: skip
        return model.parameters.tobytes(), rule.lr, rule.others.lr

    rule = bp.Muon()
    train("parts", 2)
    assert train("parts", 4) == train("whole", 4)
    assert rule.lr == 0.04 / 16 and rule.others.lr == pytest.approx(0.03 / 81)
    with pytest.raises(bp.CheckpointMismatchError, match=r"optimizer\.momentum: 0\.95 there"):
        train("parts", 5, momentum=0.9)


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
    with pytest.raises(bp.OptionError, match=r"Muon: lr: expected a number in \[0, inf\), got -1"):
        bp.Muon(lr=-1)
    with pytest.raises(bp.OptionError, match="Muon: nesterov: expected True or False, got 1"):
        bp.Muon(nesterov=1)  # type: ignore[arg-type]
    with pytest.raises(bp.KindError, match="Muon: others: expected an optimizer, got str"):
        bp.Muon(others="AdamW")  # type: ignore[arg-type]
