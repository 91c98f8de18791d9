"""Layers: what a network is made of, as data. Parameters live in the model's arena."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from backprop_kernels import checks
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.errors import KindError, OptionError, ShapeError

from backprop.initializers import INITIALIZERS


@dataclass(frozen=True)
class Linear:
    """Y = act(X Wᵀ + b): weight (out_features, in_features), bias (out_features,).

    `init` is "auto" (picked by activation) or a name from `backprop.initializers`.
    """

    in_features: int
    out_features: int
    activation: str = "identity"
    bias: bool = True
    init: str = "auto"

    def __post_init__(self) -> None:
        _size("Linear", "in_features", self.in_features)
        _size("Linear", "out_features", self.out_features)
        checks.choice("Linear", "activation", self.activation, ACTIVATIONS)
        checks.choice("Linear", "init", self.init, {"auto": None, **INITIALIZERS})


@dataclass(frozen=True)
class BatchNorm:
    """Normalises each feature over the batch; at prediction by running statistics."""

    features: int
    activation: str = "identity"
    momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _norm("BatchNorm", self.features, self.activation, self.eps)
        _number("BatchNorm", "momentum", self.momentum, 0.0, 1.0)


@dataclass(frozen=True)
class LayerNorm:
    """Normalises each row over its features."""

    features: int
    activation: str = "identity"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _norm("LayerNorm", self.features, self.activation, self.eps)


@dataclass(frozen=True)
class RMSNorm:
    """Divides each row by the root of its mean square; a scale, and no shift."""

    features: int
    activation: str = "identity"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _norm("RMSNorm", self.features, self.activation, self.eps)


@dataclass(frozen=True)
class Dropout:
    """Zeroes each output of the layer before it with probability `rate`, in training only.

    As the first layer it drops inputs. What is kept is scaled by 1/(1 − rate).
    """

    rate: float

    def __post_init__(self) -> None:
        _number("Dropout", "rate", self.rate, 0.0, math.nextafter(1.0, 0.0))


Layer: TypeAlias = Linear | BatchNorm | LayerNorm | RMSNorm | Dropout
NORMS = {"batch": BatchNorm, "layer": LayerNorm, "rms": RMSNorm}


def mlp_layers(
    sizes: list[int], activation: str, output_activation: str, dropout: float,
    norm: str | None, init: str, input_dropout: float = 0.0,
) -> Iterator[Layer]:  # fmt: skip
    """Linear, norm, activation, dropout for each hidden layer; a bare Linear at the end."""
    checks.choice("MLP", "activation", activation, ACTIVATIONS)
    if norm is not None:
        checks.choice("MLP", "norm", norm, NORMS)
    if input_dropout:
        yield Dropout(input_dropout)
    for fan_in, fan_out in pairwise(sizes[:-1]):
        if norm is None:
            yield Linear(fan_in, fan_out, activation, init=init)
        else:  # the norm's beta replaces the bias, its epilogue the activation
            init_below = ACTIVATIONS[activation].init if init == "auto" else init
            yield Linear(fan_in, fan_out, bias=False, init=init_below)
            yield NORMS[norm](fan_out, activation)
        if dropout:
            yield Dropout(dropout)
    yield Linear(sizes[-2], sizes[-1], output_activation, init=init)


def check_chain(layers: list[Layer]) -> None:
    """Refuse layers that do not fit one another, naming the place."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise KindError(
                f"Sequential: layers[{i}]: expected Linear, BatchNorm, LayerNorm, RMSNorm or "
                f"Dropout, got {type(layer).__name__}"
            )
    if not any(isinstance(layer, Linear) for layer in layers):
        raise ShapeError("Sequential: layers: expected at least one Linear, got none")
    width: int | None = None
    for i, layer in enumerate(layers):
        if isinstance(layer, Dropout):
            if i == len(layers) - 1 or isinstance(layers[i + 1], Dropout):
                raise OptionError(
                    f"Sequential: layers[{i}]: expected Dropout before a layer with parameters "
                    "(it belongs to what it drops: the input, or the layer before it)"
                )
            continue
        expects = layer.in_features if isinstance(layer, Linear) else layer.features
        if width is not None and expects != width:
            raise ShapeError(
                f"Sequential: layers[{i}]: expected {width} input features "
                f"(what the layer before it makes), got {layer}"
            )
        width = layer.out_features if isinstance(layer, Linear) else layer.features


def _size(where: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{where}: {name}: expected an integer ≥ 1, got {value!r}")


def _number(where: str, name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise OptionError(f"{where}: {name}: expected a number in [{low}, {high}], got {value!r}")


def _norm(where: str, features: int, activation: str, eps: float) -> None:
    _size(where, "features", features)
    checks.choice(where, "activation", activation, ACTIVATIONS)
    _number(where, "eps", eps, 1e-12, 1.0)
