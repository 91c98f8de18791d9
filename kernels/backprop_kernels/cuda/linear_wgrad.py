"""linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad

The kernel and its contract: linear_wgrad.cu; a batch that is cut is finished by column_sums.cu.
linear_wgrad_update.cu updates W by it as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.by_tiles import down_k, grid, read, written
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, plain_variant
from backprop_kernels.cuda.launch import capability, constant, empty, launch, on_device
from backprop_kernels.cuda.part import STRIP, adds_up, rows_before, rows_of_whole
from backprop_kernels.cuda.tensor_map import can_map
from backprop_kernels.cuda.tiles import LIBRARY, Choice, choose
from backprop_kernels.precisions import PRECISIONS


class WeightUpdate(NamedTuple):
    """What linear_wgrad_update.cu takes besides, in its order; W and moments (out, in)."""

    rule: str  # the text of `step`
    W: Array
    moment0: Array
    moment1: Array | None
    scalars: Array  # of this tensor
    sure: Array  # (), uint32
    squares: Array  # (`squares`,), float64


def linear_wgrad(dZ: Array, X: Array, out: Array | None = None) -> Array:
    """dZ (batch, out), X (batch, in) → dW (out, in)."""
    return wgrad(None, None, dZ, X, out)


def reads_along_batch(precision: str, dZ: Array, dW: Array) -> bool:
    """Whether `wgrad` reads dZ and X along the batch, so that whoever makes them should write such
    copies as well."""
    return chosen(precision, dZ, dW, dW).along_k  # rows of X start as those of dW do


def wgrad(
    precision: str | None, unscale: Array | None, dZ: Array, X: Array, out: Array | None = None,
    copies: tuple[Array | None, Array | None] = (None, None), update: WeightUpdate | None = None,
) -> Array:  # fmt: skip
    """`linear_wgrad` in a precision, or dZ's own; `unscale` as in linear_dgrad.py.

    `copies`: dZᵀ and Xᵀ as transpose.py has them, where other kernels have written them.
    With `update`, where `can_update` says so and nothing is scaled, the kernel updates W instead;
    dW is written where it is not sure that the step can be applied.
    """
    checks.linear_wgrad(dZ, X, out, precision)
    on_device("linear_wgrad", dZ=dZ, X=X, out=out)
    (batch, out_features), in_features = dZ.shape, X.shape[1]
    real = PRECISIONS[precision or str(dZ.dtype)].real
    dW = empty((out_features, in_features), real) if out is None else out
    if not dW.size:
        return dW
    choice = chosen(precision, dZ, X, dW)
    tile, runs, before = choice.tile, max(1, -(-batch // choice.run)), rows_before()
    in_runs = _runs(choice) > 1  # the whole batch
    if tile is LIBRARY:
        cublaslt.product("linear_wgrad", choice.precision.name, dZ, X, dW, unscale)
        return dW
    adds_up(choice.run if in_runs else STRIP, "linear_wgrad")
    slices, unfinished, turns, start = dW, None, None, "FRESH"
    if before is not None and (tile.generation == "hopper" or not in_runs):
        start = "ADDED" if in_runs else "CHAINED"
    if runs > 1 and tile.generation == "hopper":
        tiles = tile.clusters(out_features, in_features) * tile.cluster
        unfinished = empty((tiles, tile.rows, tile.columns), real)
        turns = constant(np.zeros((tiles, tile.rows // tile.summed_rows)), np.uint32)
    elif in_runs and tile.generation != "hopper":
        slices = empty((runs, dW.size), real)
    blocks = grid(choice, out_features, in_features, runs, dZ)
    operands = [
        read(tile, down_k(choice, m, copy)) for m, copy in zip((dZ, X), copies, strict=True)
    ]
    sizes = out_features, in_features, batch, choice.run
    if update is not None:
        variant = plain_variant(real, choice.types) + update.rule
        launch(
            Unit("linear_wgrad_update.cu", variant), "linear_wgrad_update", blocks,
            (tile.threads,), *operands, written(tile, update.W), *update[1:4], dW,
            *update[4:], unfinished, turns, *sizes, shared=tile.shared,
        )  # fmt: skip
        return dW
    types = (*choice.types, f"#define SUMS_FROM {start}")
    launch(
        Unit("linear_wgrad.cu", plain_variant(real, types)), "linear_wgrad", blocks,
        (tile.threads,), *operands, unscale, written(tile, slices), unfinished, turns, dW, before,
        *sizes, shared=tile.shared,
    )  # fmt: skip
    if slices is not dW:
        column_sums(slices, dW.reshape(-1), before=before)
    return dW


def chosen(precision: str | None, dZ: Array, X: Array, dW: Array) -> Choice:
    """The kernel for this product."""
    return choose(
        "linear_wgrad", len(dW), dW.shape[1], rows_of_whole(len(dZ)), precision or str(dZ.dtype),
        capability(dZ), can_map(dZ, X, dW),
    )  # fmt: skip


def can_update(choice: Choice) -> bool:
    """Whether the kernel has the whole sum of an element at once, so that it can update W by it.

    The library makes sums alone, and runs of one batch are added up by another kernel, but for
    Hopper's, which take turns.
    """
    return choice.tile is not LIBRARY and (_runs(choice) == 1 or choice.tile.generation == "hopper")


def squares(choice: Choice) -> int:
    """How many sums of squares linear_wgrad_update.cu leaves: of every warp of every tile."""
    tile = choice.tile
    tiles = -(-choice.rows // tile.summed_rows) * -(-choice.columns // tile.columns)
    return tiles * tile.writers // 32


def _runs(choice: Choice) -> int:
    return max(1, -(-choice.terms // choice.run))
