"""Initial weights. `auto` is the activation table's choice.

Sources: Glorot & Bengio 2010; He et al. 2015; LeCun et al. 1998; Saxe et al. 2014.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
from backprop_kernels.arrays import Array

Initializer = Callable[["np.random.Generator", int, int], Array]  # NumPy loads it on use: 10 ms


def _uniform(variance: Callable[[int, int], float]) -> Initializer:
    def draw(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
        limit = sqrt(3 * variance(in_features, out_features))
        return rng.uniform(-limit, limit, (out_features, in_features))

    return draw


def _normal(variance: Callable[[int, int], float]) -> Initializer:
    def draw(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
        deviation = sqrt(variance(in_features, out_features))
        return deviation * rng.standard_normal((out_features, in_features))

    return draw


def _orthogonal(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
    tall = rng.standard_normal((max(out_features, in_features), min(out_features, in_features)))
    Q, R = np.linalg.qr(tall)
    Q = Q * np.sign(np.diag(R))  # uniform over the orthogonal matrices, not QR's favourites
    return Q if out_features >= in_features else Q.T


def _zeros(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
    return np.zeros((out_features, in_features))


# Each makes a (out_features, in_features) float64 array; the rules give its variance.
INITIALIZERS: dict[str, Initializer] = {
    "glorot_uniform": _uniform(lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    "glorot_normal": _normal(lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    "he_uniform": _uniform(lambda fan_in, fan_out: 2 / fan_in),
    "he_normal": _normal(lambda fan_in, fan_out: 2 / fan_in),
    "lecun_uniform": _uniform(lambda fan_in, fan_out: 1 / fan_in),
    "lecun_normal": _normal(lambda fan_in, fan_out: 1 / fan_in),
    "orthogonal": _orthogonal,
    "zeros": _zeros,
}
