"""Samples against the arrays written out; verdicts on networks built to be ill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprop as bp

rng = np.random.default_rng(0)
X, y = rng.standard_normal((64, 6)), rng.standard_normal((64, 2))


def rms(a: Any) -> float:
    return float(np.sqrt((np.asarray(a, np.float64) ** 2).mean()))


def fit(model: bp.Sequential, health: bp.Health, **options: Any) -> bp.History:
    given = {"optimizer": bp.SGD(lr=0.05), "batch_size": 64, "progress": False, "epochs": 1}
    return bp.fit(model, X, y, **{**given, "callbacks": [health], "shuffle": False, **options})


def test_one_sample_by_hand(device: str) -> None:
    model = bp.MLP([6, 8, 5, 2], "tanh", dtype="float64", device=device)
    twin = bp.MLP([6, 8, 5, 2], "tanh", dtype="float64", device=device)
    W = [twin.state_dict()[f"layers.{i}.weight"] for i in range(3)]
    _, g = bp.value_and_grad(twin, X, y)
    health = bp.Health()
    fit(model, health)
    Y1 = np.tanh(X @ W[0].T)
    Y2 = np.tanh(Y1 @ W[1].T)
    Y3 = Y2 @ W[2].T
    d3 = 2 * (Y3 - y) / 2  # the mean over two outputs; times the batch, that of a row's own loss
    d2 = (d3 @ W[2]) * (1 - Y2**2)
    d1 = (d2 @ W[1]) * (1 - Y1**2)
    expected = {
        "activation": [rms(a) for a in (Y1, Y2, Y3)],
        "delta": [rms(d) for d in (d1, d2, d3)],
        "gradient": [rms(g[f"layers.{i}.weight"]) for i in range(3)],
        "update": [
            0.05 * np.linalg.norm(g[f"layers.{i}.weight"]) / np.linalg.norm(W[i]) for i in range(3)
        ],
        "saturated": [(np.abs(Y1) > 0.96).mean(), (np.abs(Y2) > 0.96).mean(), np.nan],
        "dead": [np.nan] * 3,
    }
    assert health.steps == [1]
    for name, values in expected.items():
        np.testing.assert_allclose(health.samples[name][0], values, rtol=1e-10, err_msg=name)


def test_one_step_in_so_many_and_the_last_sample_in_the_history(device: str) -> None:
    health = bp.Health(every=3)
    history = fit(bp.MLP([6, 8, 2], device=device), health, epochs=4, batch_size=16)
    assert health.steps == [1, 4, 7, 10, 13, 16]
    last_of_epoch = [1, 2, 3, 5]  # steps 4, 8, 12, 16
    for name in ("delta", "update", "dead"):
        sampled = [health.samples[name][i][0] for i in last_of_epoch]
        assert history[f"{name} layers.0"] == sampled
    assert "dead layers.1" not in history and "saturated layers.0" not in history


def test_sampling_changes_no_bit(device: str) -> None:
    models = [bp.MLP([6, 8, 2], dropout=0.1, norm="layer", device=device) for _ in range(2)]
    for model, callbacks in zip(models, ([], [bp.Health(every=1)]), strict=True):
        bp.fit(model, X, y, epochs=3, progress=False, callbacks=callbacks)
    assert models[0].parameters.tobytes() == models[1].parameters.tobytes()


def test_frozen_layers_and_accumulated_steps_are_sampled_where_there_is_something(
    device: str,
) -> None:
    model = bp.MLP([6, 8, 5, 2], device=device)
    model.freeze(depth=1)
    health = bp.Health(every=1)
    fit(model, health, batch_size=16, accumulate=2)
    assert health.steps == [1, 2]
    assert np.isnan([row[0] for row in health.samples["delta"]]).all()
    assert np.array(health.samples["update"])[:, 0].tolist() == [0, 0]
    assert np.isfinite(np.array(health.samples["delta"])[:, 1:]).all()


def sick(activation: str, scale: float, layers: int = 12, **options: Any) -> list[str]:
    """The verdicts on a deep network whose weights are N(0, scale²)."""
    model = bp.MLP([6, *[16] * layers, 2], activation, device="cpu", dtype="float64")
    draw = np.random.default_rng(0)
    state = {
        n: draw.normal(0, scale, w.shape) if w.ndim == 2 else w
        for n, w in model.state_dict().items()
    }
    model.load_state_dict(state)
    health = bp.Health()
    fit(model, health, optimizer=bp.SGD(lr=1e-9), **options)
    return [verdict.partition(":")[0] for verdict in health.verdicts()]


def test_verdicts() -> None:
    assert "vanishing" in sick("sigmoid", 0.1)
    assert "exploding" in sick("relu", 1.0)
    assert set(sick("relu", 0.35)) == {"frozen"}  # He's scale; lr 1e-9 moves nothing
    assert sick("tanh", 5.0).count("saturated") >= 10

    dead = bp.MLP([6, 16, 2], "relu", dtype="float64")
    state = dead.state_dict()
    state["layers.0.bias"][:12] = -100
    dead.load_state_dict(state)
    health = bp.Health()
    fit(dead, health, optimizer=bp.SGD(lr=1e-3))
    assert health.verdicts()[0].startswith("dead: layers.0: 75% of the units are 0")
    restless = bp.Health()
    fit(bp.MLP([6, 16, 2]), restless, optimizer=bp.SGD(lr=50.0))
    assert any(verdict.startswith("restless: layers.1 moves by") for verdict in restless.verdicts())
    fine = bp.Health()
    fit(bp.MLP([6, 16, 16, 2]), fine, optimizer=bp.SGD(lr=1e-2))
    assert fine.verdicts() == [] and str(fine).endswith("healthy")


def test_norms_beyond_float32_are_norms() -> None:
    from backprop.health import _norm

    with np.errstate(over="ignore"):
        assert _norm(np.full(100, 1e30, np.float32)) == pytest.approx(1e31, rel=1e-6)
    assert np.isnan(_norm(np.array([np.nan, 1], np.float32)))


def test_picture_table_and_state(tmp_path: Path) -> None:
    health = bp.Health(every=1)
    for call in (lambda: health.mean("delta"), health.verdicts, lambda: str(health),
                 lambda: health.plot(tmp_path / "h.png")):  # fmt: skip
        with pytest.raises(bp.DataError, match="expected a fit before, got no sample"):
            call()
    fit(bp.MLP([6, 8, 2]), health, epochs=3)
    health.plot(tmp_path / "h.png", "title")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert str(health).splitlines()[0].split() == list(health.samples)
    other = bp.Health()
    other.load_state_dict(health.state_dict())
    assert other.steps == health.steps and np.array_equal(other.mean("delta"), health.mean("delta"))
    with pytest.raises(bp.OptionError, match="Health: every: expected an integer ≥ 1, got 0"):
        bp.Health(every=0)
