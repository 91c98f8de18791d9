"""loss: value, dZ and db in one pass.  docs/derivations.md#loss"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backprop_kernels import checks
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.losses import LOSSES
from backprop_kernels.reference import array_math as m
from backprop_kernels.reference.epilogue import write


def loss(
    Z: Array,
    target: Array,
    name: str = "mse",
    options: Mapping[str, Any] | None = None,
    activation: str = "identity",
    sample_weight: Array | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array, Array]:
    """Z (batch, out), target → loss (), dZ (batch, out), db (out) = column sums of dZ.

    The loss is taken of Y = activation(Z). target is (batch, out); for cross_entropy also
    (batch,) class ids; for gaussian_nll (batch, out/2). An empty batch, or weights that sum to
    zero, give a loss and gradients of exactly 0.
    """
    checks.loss(Z, target, name, options or {}, activation, sample_weight, out)
    options = {**LOSSES[name].options, **(options or {})}
    act = ACTIVATIONS[activation]
    weight = np.ones(len(Z), Z.real.dtype) if sample_weight is None else sample_weight
    with np.errstate(all="ignore"):
        Y = act.forward(m, Z)
        total = weight.sum()
        if name == "cross_entropy":
            values, dY, weight, total = _cross_entropy(Y, target, weight, **options)
        elif name == "gaussian_nll":
            values, dY = _gaussian_nll(Y, target)
        else:
            values, dY = _elementwise(Y, target, name, options)
        scale = np.where(total == 0, 0, weight / np.where(total == 0, 1, total))
        # A weight of 0 removes its row, even a row whose loss is infinite.
        value = np.where(scale == 0, 0, values * scale).sum()
        dZ = np.where(scale[:, None] == 0, 0, dY * scale[:, None])
        dZ = (dZ * act.derivative(m, {"Y": Y, "Z": Z, "": None}[act.saves])).astype(Z.dtype)
    given = out or (None, None, None)
    value = np.asarray(value, Z.dtype if np.iscomplexobj(Z) else np.float64)
    dZ = write(given[1], dZ)
    return write(given[0], value), dZ, write(given[2], dZ.sum(axis=0))


def _elementwise(Y: Array, target: Array, name: str, options: Any) -> tuple[Array, Array]:
    row = LOSSES[name]
    assert row.value is not None and row.gradient is not None
    arguments = [np.asarray(options[option], Y.real.dtype) for option in row.options]
    outputs = max(Y.shape[1], 1)
    values = row.value(m, Y, target, *arguments).sum(axis=1) / outputs
    return values, row.gradient(m, Y, target, *arguments) / outputs


def _gaussian_nll(Y: Array, target: Array) -> tuple[Array, Array]:
    half = Y.shape[1] // 2
    mu, s = Y[:, :half], Y[:, half:]
    d, precision = mu - target, m.exp(-s)
    values = (0.5 * (s + d * d * precision)).sum(axis=1) / max(half, 1)
    gradient = np.concatenate([d * precision, 0.5 * (1 - d * d * precision)], axis=1)
    return values, gradient / max(half, 1)


def _cross_entropy(
    Z: Array, target: Array, weight: Array, label_smoothing: float, class_weight: Any,
    ignore_index: int,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Values, ∂/∂Z, row weights and what the mean divides by (PyTorch's conventions)."""
    classes = Z.shape[1]
    per_class = np.ones(classes) if class_weight is None else np.asarray(class_weight)
    per_class = per_class.astype(Z.real.dtype)
    P, total = target, weight.sum()
    if target.ndim == 1:
        ignored = target == ignore_index
        checks.class_ids(target, classes, ignore_index)
        ids = np.where(ignored, 0, target)
        P = (ids[:, None] == np.arange(classes)).astype(Z.real.dtype)
        weight = np.where(ignored, 0, weight)
        # Class weights of ids count as sample weights: the mean divides by them too.
        total = (weight * per_class[ids]).sum() if classes else weight.sum()
    P = (1 - label_smoothing) * P + label_smoothing / max(classes, 1)
    Q = P * per_class
    shifted = Z - Z.real.max(axis=1, keepdims=True, initial=-np.inf) if classes else Z
    log_sum = m.log(m.exp(shifted).sum(axis=1, keepdims=True))
    log_softmax = shifted - log_sum
    # 0 · (−∞) counts as 0: a class that carries no probability costs nothing.
    values = -np.where(Q == 0, 0, Q * log_softmax).sum(axis=1)
    return values, m.exp(log_softmax) * Q.sum(axis=1, keepdims=True) - Q, weight, total
