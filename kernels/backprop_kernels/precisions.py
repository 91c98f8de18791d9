"""THE precision table: how the products of linear layers are computed.

Whatever the row, sums are accumulated in the dtype of the model, float32, as are parameters,
gradients of parameters, biases, the loss and the optimizer. What a row changes is the operands of
the products, and with them what activations and deltas are stored as. NumPy has no bfloat16: its
bits lie in uint16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Precision(NamedTuple):
    """One way to multiply."""

    name: str
    real: str  # dtype of sums, parameters and their gradients
    stored: str  # dtype of activations, deltas and the copy of the weights that products read
    digits: int  # of the significand of an operand, in bits: it is rounded to 2^-digits
    smallest: (
        float  # spacing of operands around 0: rounding moves no number by more than half of it
    )
    tensor_cores: bool
    loss_scaling: bool  # the deltas are multiplied by a power of two, lest they vanish
    products: int = 1  # of 16-bit numbers that make one product of operands


PRECISIONS = {
    row.name: row
    for row in (
        Precision("float64", "float64", "float64", 53, 2.0**-1074, False, False),
        Precision("float32", "float32", "float32", 24, 2.0**-149, False, False),
        Precision("tf32", "float32", "float32", 11, 2.0**-136, True, False),
        Precision("bf16", "float32", "uint16", 8, 2.0**-133, True, False),
        Precision("fp16", "float32", "float16", 11, 2.0**-24, True, True),
        Precision("bf16x3", "float32", "float32", 16, 2.0**-133, True, False, 3),
        Precision("bf16x6", "float32", "float32", 24, 2.0**-133, True, False, 6),
    )
}


def round_to(x: np.ndarray, precision: str) -> np.ndarray:
    """x (float32) as this precision stores it, ties to even."""
    stored = np.dtype(PRECISIONS[precision].stored)
    if precision != "bf16":
        with np.errstate(over="ignore"):
            return x.astype(stored)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = bits >> np.uint32(16) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet_nan, nearest).astype(stored)


def widen(x: np.ndarray) -> np.ndarray:
    """What `round_to` gave, as float32."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)
