"""mlp_step: loss and gradients of a whole network.  docs/derivations.md#mlp_step"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backprop_kernels import checks, reference
from backprop_kernels.arrays import Array, LinearLayer
from backprop_kernels.by_layers import by_layers


def mlp_step(
    X: Array,
    target: Array,
    P: Array,
    layers: Sequence[LinearLayer],
    name: str = "mse",
    options: Mapping[str, Any] | None = None,
    sample_weight: Array | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """X (batch, in), target, P (parameters) → loss (), G (parameters) = ∂L/∂P.

    `layers` say where each W and b lie in P. Of G, what belongs to no layer is left alone.
    """
    checks.mlp_step(X, target, P, layers, name, options or {}, sample_weight, out)
    value, G = out or (None, None)
    G = np.zeros_like(P) if G is None else G
    return by_layers(reference, X, target, P, layers, name, options, sample_weight, value, G)
