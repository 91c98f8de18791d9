"""The reference, proved: every gradient equals Im L(p + ih)/h to 1e-13 of its tensor's largest.

Complex step subtracts nothing, so it is exact to rounding. It is blind to errors that forward and
backward share (a mean over the wrong count, say): for those see test_loss.py and oracles.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.losses import LOSSES

from backprop import BatchNorm, Dropout, LayerNorm, Linear, Loss, Sequential, value_and_grad
from backprop.gradcheck import complex_loss
from tests import oracles
from tests.kernels.test_loss import CASES, IDS

BOUND = 1e-13
BATCH, WIDTHS = 7, (5, 4, 6)


def worst_error(
    model: Sequential, loss: Loss, weighted: bool = False, dense: bool = False
) -> float:
    """Largest error over all parameters, each relative to its tensor's largest derivative."""
    rng = np.random.default_rng(0)
    model.parameters += 0.1 * rng.standard_normal(model.parameters.size)  # biases too
    X = rng.standard_normal((BATCH, model.in_features))
    outputs = model.out_features // (2 if loss.name == "gaussian_nll" else 1)
    y = oracles.targets(LOSSES[loss.name].targets, rng, BATCH, outputs, np.dtype(np.float64))
    if dense:
        y = rng.dirichlet(np.ones(outputs), BATCH)
    weight = rng.random(BATCH) if weighted else None
    _, gradients = value_and_grad(model, X, y, loss, weight, seed=5)
    derivative = complex_loss(model, X, y, loss, weight, seed=5)
    worst = 0.0
    for name, gradient in gradients.items():
        first = model.layout.offsets[name]
        exact = np.array([derivative(first + i) for i in range(gradient.size)])
        scale = np.abs(exact).max()
        assert scale > 0, f"{name} has no derivative to check"
        worst = max(worst, np.abs(gradient.ravel() - exact).max() / scale)
    return worst


def network(*layers: Any) -> Sequential:
    return Sequential(layers, dtype="float64", device="reference", seed=1)


def two_layers(activation: str) -> Sequential:
    first, second, third = WIDTHS
    return network(
        Linear(first, second, activation, init="glorot_normal"),
        Linear(second, third, init="glorot_normal"),
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_under_every_loss(activation: str, name: str) -> None:
    assert worst_error(two_layers(activation), Loss(name)) <= BOUND


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_every_option_of_every_loss(name: str, options: dict[str, Any], weighted: bool) -> None:
    assert worst_error(two_layers("tanh"), Loss(name, **options), weighted) <= BOUND


@pytest.mark.parametrize("options", [o for n, o in CASES if n == "cross_entropy"])
def test_soft_targets(options: dict[str, Any]) -> None:
    loss = Loss("cross_entropy", **options)
    assert worst_error(two_layers("tanh"), loss, weighted=True, dense=True) <= BOUND


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_output_activation(activation: str) -> None:
    model = network(Linear(5, 4, "tanh"), Linear(4, 6, activation))
    assert worst_error(model, Loss("log_cosh"), weighted=True) <= BOUND


# What a batch norm takes out again (a bias before it) has a derivative of 0, so none stands there.
PLACES: dict[str, Any] = {
    "first": lambda norm, act: network(norm(5, act), Linear(5, 6)),
    "between": lambda norm, act: network(
        Linear(5, 4, "identity", bias=norm is LayerNorm), norm(4, act), Linear(4, 6)
    ),
    "last": lambda norm, act: network(
        Linear(5, 4, act, bias=norm is LayerNorm), Linear(4, 6, bias=norm is LayerNorm),
        norm(6, "tanh"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", [LayerNorm, BatchNorm])
def test_every_norm(norm: Any, place: str, activation: str) -> None:
    assert worst_error(PLACES[place](norm, activation), Loss("mse")) <= BOUND


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("first", [Linear(5, 8), LayerNorm(5), BatchNorm(5)], ids=repr)
def test_dropout_after_every_kind_of_layer(first: Any, activation: str) -> None:
    width = first.out_features if isinstance(first, Linear) else first.features
    model = network(
        replace(first, activation=activation), Dropout(0.3), Linear(width, 6, "tanh"),
        Dropout(0.2), Linear(6, 6),
    )  # fmt: skip
    assert worst_error(model, Loss("cross_entropy", label_smoothing=0.1)) <= BOUND


def test_network_of_one_layer_and_of_width_one() -> None:
    assert worst_error(network(Linear(3, 1)), Loss("bce_with_logits")) <= BOUND
    model = network(Linear(1, 1, "tanh"), Linear(1, 1, "tanh"), Linear(1, 1))
    assert worst_error(model, Loss("huber")) <= BOUND
