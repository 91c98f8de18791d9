from __future__ import annotations

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from scipy import stats  # type: ignore[import-untyped]

import backprop as bp
from backprop.initializers import INITIALIZERS

FAN_OUT, FAN_IN = 300, 200
VARIANCE = {
    "glorot": 2 / (FAN_IN + FAN_OUT),
    "he": 2 / FAN_IN,
    "lecun": 1 / FAN_IN,
}


@pytest.mark.parametrize("rule", VARIANCE)
@pytest.mark.parametrize("shape", ["uniform", "normal"])
def test_distribution_is_the_published_one(rule: str, shape: str) -> None:
    W = INITIALIZERS[f"{rule}_{shape}"](np.random.default_rng(0), FAN_OUT, FAN_IN)
    assert W.shape == (FAN_OUT, FAN_IN)
    deviation = np.sqrt(VARIANCE[rule])
    # The whole distribution, not only its variance: at 60,000 draws a scale wrong by 2 % fails.
    expected = {
        "normal": stats.norm(0, deviation),
        "uniform": stats.uniform(-np.sqrt(3) * deviation, 2 * np.sqrt(3) * deviation),
    }[shape]
    assert stats.kstest(W.ravel(), expected.cdf).pvalue > 0.01
    assert abs(W.var() / VARIANCE[rule] - 1) < 0.03


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (1, 7)])
def test_orthogonal_weights_keep_lengths(size: tuple[int, int]) -> None:
    W = INITIALIZERS["orthogonal"](np.random.default_rng(0), *size)
    small = W.T @ W if size[0] >= size[1] else W @ W.T
    np.testing.assert_allclose(small, np.eye(min(size)), atol=1e-13)


def test_orthogonal_weights_have_no_favourite_direction() -> None:
    """QR alone would make every first entry of R positive, and the corner of W of one sign."""
    corners = [INITIALIZERS["orthogonal"](np.random.default_rng(s), 3, 3)[0, 0] for s in range(200)]
    assert 60 < sum(c > 0 for c in corners) < 140


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_auto_is_the_activation_tables_choice(activation: str) -> None:
    auto = bp.Sequential([bp.Linear(9, 8, activation)], device="reference", seed=3)
    chosen = ACTIVATIONS[activation].init
    named = bp.Sequential([bp.Linear(9, 8, activation, init=chosen)], device="reference", seed=3)
    assert auto.parameters.tobytes() == named.parameters.tobytes()
    draw = INITIALIZERS[chosen](np.random.default_rng(3), 8, 9).astype(np.float32)
    assert auto.state_dict()["layers.0.weight"].tobytes() == draw.tobytes()


def test_auto_below_a_norm_follows_the_norms_activation() -> None:
    model = bp.MLP([9, 8, 1], "selu", norm="batch", device="reference", seed=3)
    draw = INITIALIZERS["lecun_normal"](np.random.default_rng(3), 8, 9).astype(np.float32)
    assert model.state_dict()["layers.0.weight"].tobytes() == draw.tobytes()


def test_zeros() -> None:
    assert not bp.MLP([9, 8, 1], init="zeros", device="reference").parameters.any()
