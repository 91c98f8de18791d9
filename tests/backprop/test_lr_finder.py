"""The range test: it finds the edge of stability, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import backprop as bp

rng = np.random.default_rng(0)


def test_it_finds_the_edge_of_stability(device: str) -> None:
    """The loss is (w − 1)², L″ = 2: gradient descent falls up to lr = 2/L″ = 1, then diverges."""
    x = np.where(rng.random(200) < 0.5, -1.0, 1.0)[:, None]
    model = bp.Sequential([bp.Linear(1, 1, bias=False)], dtype="float64", device=device)
    model.load_state_dict({"layers.0.weight": [[5.0]]})
    curve = bp.find_lr(model, x, x, "mse", bp.SGD(), low=1e-4, high=100)
    assert 0.05 < curve.suggestion < 1
    assert curve.rates[-1] < 50 and curve.losses[-1] > 4 * min(curve.losses)  # stopped there


def test_nothing_of_it_remains(device: str) -> None:
    X, y = rng.standard_normal((64, 4)), rng.standard_normal(64)
    model = bp.MLP([4, 8, 1], norm="batch", device=device)
    rule = bp.SGD(lr=0.25, momentum=0.9)
    before = {n: v.tobytes() for n, v in model.state_dict().items()}
    curve = bp.find_lr(model, X, y, optimizer=rule, batch_size=16, low=1e-6, high=1e6, steps=60)
    assert {n: v.tobytes() for n, v in model.state_dict().items()} == before and rule.lr == 0.25
    np.testing.assert_allclose(np.diff(np.log(curve.rates)), np.log(1e12) / 59)


def test_no_fall_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(bp.DataError, match=r"expected a fall within 1e-05 … 0\.001, got none"):
        _ = bp.LRCurve([1e-5, 1e-4, 1e-3], [1.0, 1.0, 1.0]).suggestion
    bp.LRCurve([1e-5, 1e-4, 1e-3], [1.0, 0.5, 2.0]).plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(bp.OptionError, match=r"low, high: expected 0 < low < high, got 1, 0.1"):
        bp.find_lr(bp.MLP([4, 1]), np.ones((3, 4)), np.ones(3), low=1, high=0.1)
