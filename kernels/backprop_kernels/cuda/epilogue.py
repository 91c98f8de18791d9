"""What launchers share: the epilogue's text and arguments, what is saved, column sums."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from backprop_kernels.activations import ACTIVATIONS, saved_as_bits
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda import code
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.launch import launch, on_device
from backprop_kernels.cuda.part import rows_before
from backprop_kernels.cuda.tiles import NUMBERS

SAVES, SAVED_AS_BITS = {"": 0, "Y": 1, "Z": 2}, 3  # as epilogue.cuh numbers them
SAVES_BITS = True  # for activations with two slopes; in other backends they save Y or Z
SUM_THREADS = 256


@cache
def variant(dtype: Any, activation: str, types: tuple[str, ...] = ()) -> str:
    """The text of variant.cuh for epilogue.cuh; `types` as in code.variant."""
    act = ACTIVATIONS[activation]
    bits = saved_as_bits(activation, SAVES_BITS)
    flat, steep = act.slopes or (0.0, 0.0)
    return code.variant(
        dtype,
        code.function("activation", ["z"], lambda z: act.forward(code, z)),
        code.function("derivative", ["saved"], lambda saved: act.derivative(code, saved)),
        f"constexpr real FLAT = real({flat!r}), STEEP = real({steep!r});\n"
        f"using kept = {'u32' if bits else 'stored'};\n",
        types=types,
        SAVES=SAVED_AS_BITS if bits else SAVES[act.saves],
    )


def storage(precision: str | None, as_sums: bool) -> tuple[str, ...]:
    """The lines of variant.cuh that say what a norm's arrays hold; `as_sums`: Y holds `real`."""
    stored = "real" if precision is None else NUMBERS[precision][0]
    result = "real" if as_sums else "stored"
    return '#include "floats.cuh"', f"using stored = {stored};", f"using result = {result};"


def dropout_arguments(dropout: Dropout | None, dtype: Any) -> tuple[Any, ...]:
    """stream, rows before these, layer, threshold and scale, as kernels take them; a null stream
    drops nothing."""
    dtype = np.dtype(dtype)
    if dropout is None or dropout.rate == 0:
        return None, None, 0, 0, dtype.type(1)
    on_device("dropout", stream=dropout.stream)
    scale = dtype.type(1 / (1 - dropout.rate))
    return dropout.stream, rows_before(), dropout.layer, round(dropout.rate * 2**32), scale


def column_sums(
    partial: Array, sums: Array, factor: Array | None = None, before: Array | None = None
) -> None:
    """sums (columns,) = the rows of partial (rows, columns), added in order, times factor ().

    With `before` (), where it is not 0, they are added to the sums that are there.
    """
    rows, columns = partial.shape
    if columns:
        unit = Unit("column_sums.cu", plain_variant(sums.dtype))
        grid = (-(-columns // SUM_THREADS),)
        launch(
            unit, "column_sums", grid, (SUM_THREADS,), partial, factor, before, sums, rows, columns
        )  # fmt: skip


@cache
def plain_variant(dtype: Any, types: tuple[str, ...] = ()) -> str:
    """The text of variant.cuh for a kernel without formulas."""
    return code.variant(dtype, types=types)
