"""Rounding a float32 array to what a precision stores or reads; the kernel and its contract:
cast.cu."""

from __future__ import annotations

from backprop_kernels.arrays import Array
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.launch import empty, launch, on_device
from backprop_kernels.cuda.rows import THREADS, blocks_for
from backprop_kernels.cuda.tiles import NUMBERS
from backprop_kernels.errors import KindError
from backprop_kernels.precisions import PRECISIONS


def cast(
    precision: str, values: Array, out: Array, factor: Array | None = None,
    cell: Array | None = None,
) -> None:  # fmt: skip
    """out = values · factor, rounded; factor () on the device, or None for 1."""
    row = PRECISIONS[precision]
    if (values.dtype, out.dtype) != (row.real, row.stored) or values.shape != out.shape:
        raise KindError(
            f"cast: out: expected {row.stored} of shape {values.shape} from {row.real}, got "
            f"{out.dtype} of shape {out.shape} from {values.dtype}"
        )
    on_device("cast", values=values, factor=factor, out=out)
    _cast(values, factor, out, NUMBERS[precision][0], cell)


def rounded(values: Array) -> Array:
    """The tf32 nearest to each float32, as float32: what wgmma reads without cutting digits off."""
    out = empty(values.shape, values.dtype)
    _cast(values, None, out, "tf32", None)
    return out


def _cast(values: Array, factor: Array | None, out: Array, stored: str, cell: Array | None) -> None:
    if out.size:
        types = ('#include "floats.cuh"', f"using stored = {stored};")
        unit = Unit("cast.cu", plain_variant(values.dtype, types))
        grid = (blocks_for(out.size),)
        launch(unit, "cast", grid, (THREADS,), values, factor, out, cell, out.size)
