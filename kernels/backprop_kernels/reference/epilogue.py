"""What follows a product or a norm (activation, dropout), and its reverse for the layer below."""

from __future__ import annotations

import numpy as np

from backprop_kernels.activations import ACTIVATIONS, WORD
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.errors import OptionError
from backprop_kernels.reference import array_math as m
from backprop_kernels.reference.philox import keep_mask


def epilogue(
    Z: Array, activation: str, dropout: Dropout | None, Y: Array | None, saved: Array | None
) -> tuple[Array, Array | None]:
    """Y = dropout(act(Z)) and what backward needs of it, written to the outputs where given."""
    act = ACTIVATIONS[activation]
    with np.errstate(all="ignore"):
        A = act.forward(m, Z)
    keep = {"Y": A, "Z": Z, "": None}[act.saves]
    if dropout is not None and dropout.rate > 0:
        A = np.where(keep_mask(Z.shape, dropout), A * Z.dtype.type(1 / (1 - dropout.rate)), 0)
    return write(Y, A), None if keep is None else write(saved, keep)


def as_bits(saved: Array, activation: str) -> Array:
    """What a backend that saves bits keeps in place of `saved`: uint32 (rows, words)."""
    act = ACTIVATIONS[activation]
    if act.slopes is None:
        raise OptionError(f"as_bits: activation: expected one with two slopes, got {activation!r}")
    with np.errstate(invalid="ignore"):
        steep = act.derivative(m, saved) != act.slopes[0]
    rows, columns = saved.shape
    bits = np.zeros((rows, -(-columns // WORD) * WORD), bool)
    bits[:, :columns] = steep
    return np.packbits(bits, axis=1, bitorder="little").view("<u4")


def through_layer_below(
    dX: Array, saved: Array | None, activation: str, dropout: Dropout | None
) -> Array:
    """dZ of the layer below from the gradient of its output."""
    if dropout is not None and dropout.rate > 0:
        dX = np.where(keep_mask(dX.shape, dropout), dX * dX.dtype.type(1 / (1 - dropout.rate)), 0)
    with np.errstate(all="ignore"):
        return (dX * ACTIVATIONS[activation].derivative(m, saved)).astype(dX.dtype, copy=False)


def write(out: Array | None, value: Array) -> Array:
    """`value` itself, or `out` filled with it where the caller gave one."""
    if out is None:
        return value
    out[...] = value
    return out
