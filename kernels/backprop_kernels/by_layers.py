"""mlp_step as the other operators, one after the other.  docs/derivations.md#mlp_step

What a backend, or a precision, does that has no kernel for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from backprop_kernels.arrays import Array, LinearLayer


def by_layers(
    backend: Any, X: Array, target: Array, P: Array, layers: Sequence[LinearLayer], name: str,
    options: Mapping[str, Any] | None, sample_weight: Array | None, value: Array | None, G: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Loss and gradients by the operators of `backend`."""
    tensors, gradients = ([_tensors(flat, layer) for layer in layers] for flat in (P, G))
    inputs, below = [X], []
    for layer, (W, b) in zip(layers[:-1], tensors, strict=False):
        Y, saved = backend.linear_forward(inputs[-1], W, b, layer.activation)
        inputs.append(Y)
        below.append((saved, layer.activation, None))
    Z, _ = backend.linear_forward(inputs[-1], *tensors[-1])
    value, dZ, _ = backend.loss(
        Z, target, name, options, layers[-1].activation, sample_weight,
        (value, None, gradients[-1][1]),
    )  # fmt: skip
    for i in reversed(range(len(layers))):
        backend.linear_wgrad(dZ, inputs[i], gradients[i][0])
        if i:
            out = None, gradients[i - 1][1]
            dZ, _ = backend.linear_dgrad(dZ, tensors[i][0], *below[i - 1], out=out)
    return value, G


def _tensors(flat: Array, layer: LinearLayer) -> tuple[Array, Array | None]:
    """W and b as views of the flat array."""

    def view(start: int, *shape: int) -> Array:
        return flat[start : start + prod(shape)].reshape(shape)

    W = view(layer.weight, layer.out_features, layer.in_features)
    return W, None if layer.bias is None else view(layer.bias, layer.out_features)
