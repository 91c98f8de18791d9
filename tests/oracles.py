"""Formulas written a second time, from the textbooks and with SciPy, in float64.

Complex step proves that a derivative belongs to its formula; only an independent formula can show
that the formula is the one promised. Nothing here reads the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from scipy import special, stats  # type: ignore[import-untyped]

Function = Callable[[Array], Array]
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _between(z: Array, low: float, high: float) -> Array:
    return np.where((z > low) & (z < high), 1.0, 0.0)


def _gelu_tanh(z: Array) -> Array:
    # (1 + tanh a)/2 is the logistic function of 2a.
    return z * special.expit(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


def _gelu_tanh_slope(z: Array) -> Array:
    c = 2 * np.sqrt(2 / np.pi)
    s = special.expit(c * (z + 0.044715 * z**3))
    return s + z * s * (1 - s) * c * (1 + 3 * 0.044715 * z**2)


def _mish_slope(z: Array) -> Array:
    t = np.tanh(np.logaddexp(0, z))
    return t + z * special.expit(z) / np.cosh(np.logaddexp(0, z)) ** 2


def _squareplus(z: Array) -> Array:
    positive = (np.abs(z) + np.hypot(z, 2)) / 2
    return np.where(z < 0, 1 / positive, positive)  # f(z) f(−z) = 1


# name: the function, its derivative; both of Z.
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: np.heaviside(z, 0)),
    "leaky_relu": (lambda z: np.maximum(z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: _between(z, 0, 6)),
    "elu": (lambda z: np.where(z > 0, z, np.expm1(z)), lambda z: np.exp(np.minimum(z, 0))),
    "celu": (lambda z: np.where(z > 0, z, np.expm1(z)), lambda z: np.exp(np.minimum(z, 0))),
    "selu": (
        lambda z: SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * np.expm1(z)),
        lambda z: SELU_SCALE * np.where(z > 0, 1, SELU_ALPHA * np.exp(z)),
    ),
    "gelu": (
        lambda z: z * special.ndtr(z),
        lambda z: special.ndtr(z) + z * stats.norm.pdf(z),
    ),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "silu": (
        lambda z: z * special.expit(z),
        lambda z: special.expit(z) + z * special.expit(z) * special.expit(-z),
    ),
    "mish": (lambda z: z * np.tanh(np.logaddexp(0, z)), _mish_slope),
    "softplus": (lambda z: np.logaddexp(0, z), special.expit),
    "softsign": (lambda z: z / (1 + np.abs(z)), lambda z: (1 + np.abs(z)) ** -2),
    "tanh": (np.tanh, lambda z: np.cosh(z) ** -2),
    "sigmoid": (special.expit, lambda z: special.expit(z) * special.expit(-z)),
    "hardtanh": (lambda z: np.clip(z, -1, 1), lambda z: _between(z, -1, 1)),
    "hardsigmoid": (lambda z: np.clip(z + 3, 0, 6) / 6, lambda z: _between(z, -3, 3) / 6),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z >= 3, 1, _between(z, -3, 3) * (2 * z + 3) / 6),
    ),
    "squareplus": (_squareplus, lambda z: _squareplus(z) / np.hypot(z, 2)),
    "sin": (np.sin, np.cos),
    "exp": (np.exp, np.exp),
}


def _huber(y: Array, t: Array, delta: float) -> Array:
    return np.asarray(special.huber(delta, y - t))


def _quantile(y: Array, t: Array, q: float) -> Array:
    return np.maximum(q * (t - y), (q - 1) * (t - y))


def _bce(z: Array, t: Array, pos_weight: Any) -> Array:
    return -pos_weight * t * special.log_expit(z) - (1 - t) * special.log_expit(-z)


def _focal(z: Array, t: Array, alpha: float, gamma: float) -> Array:
    right = special.expit(np.where(t == 1, z, -z))  # the probability of what is true
    return -np.where(t == 1, alpha, 1 - alpha) * (1 - right) ** gamma * np.log(right)


# name: the loss of each output, from output, target and options.
ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "mse": lambda y, t: (y - t) ** 2,
    "mae": lambda y, t: np.abs(y - t),
    "huber": _huber,
    "log_cosh": lambda y, t: np.log(np.cosh(y - t)),
    "poisson": lambda y, t: np.exp(y) - t * y,
    "quantile": _quantile,
    "bce_with_logits": _bce,
    "focal": _focal,
    "hinge": lambda y, t: np.maximum(0, 1 - t * y),
}


def loss(Z: Array, target: Array, name: str, options: dict[str, Any], weight: Array) -> float:
    """The weighted mean loss over the rows; `options` complete, `weight` (batch,)."""
    Z = Z.astype(np.float64)
    if name == "cross_entropy":
        return _cross_entropy(Z, target, weight.astype(np.float64), **options)
    target = target.astype(np.float64)
    if name == "gaussian_nll":
        mu, log_variance = np.split(Z, 2, axis=1)
        density = stats.norm.logpdf(target, mu, np.exp(log_variance / 2))
        rows = (-density - 0.5 * np.log(2 * np.pi)).mean(axis=1)
    else:
        rows = ELEMENTWISE[name](Z, target, **options).mean(axis=1)
    return float(np.average(rows, weights=weight))


def _cross_entropy(
    Z: Array, target: Array, weight: Array, label_smoothing: float, class_weight: Any,
    ignore_index: int,
) -> float:  # fmt: skip
    """Row by row, as PyTorch's documentation states it; 0 where nothing weighs anything."""
    classes = Z.shape[1]
    per_class = np.ones(classes) if class_weight is None else np.asarray(class_weight, float)
    log_p = special.log_softmax(Z, axis=1)
    top = bottom = 0.0
    for i in range(len(Z)):
        if target.ndim == 1:
            if target[i] == ignore_index:
                continue
            row = -(1 - label_smoothing) * per_class[target[i]] * log_p[i, target[i]]
            row -= label_smoothing / classes * (per_class * log_p[i]).sum()
            bottom += weight[i] * per_class[target[i]]
        else:
            p = (1 - label_smoothing) * target[i] + label_smoothing / classes
            row = -(p * per_class * log_p[i]).sum()
            bottom += weight[i]
        top += weight[i] * row
    return float(top / bottom) if bottom else 0.0


def targets(
    kind: str, rng: np.random.Generator, batch: int, outputs: int, dtype: np.dtype
) -> Array:
    """Random targets that a loss of this kind (`Loss.targets` in the table) accepts."""
    shape = (batch, outputs)
    if kind == "classes":
        return rng.integers(0, outputs, batch)
    drawn: dict[str, Callable[[], Array]] = {
        "real": lambda: rng.standard_normal(shape),
        "counts": lambda: rng.poisson(2.0, shape),
        "probability": lambda: rng.random(shape),
        "binary": lambda: rng.integers(0, 2, shape),
        "sign": lambda: rng.choice([-1.0, 1.0], shape),
    }
    return drawn[kind]().astype(dtype)
