"""loss: value, dZ and db in one pass.  docs/derivations.md#loss

The kernels and their contracts: loss.cu, loss_cross_entropy.cu, loss_gaussian_nll.cu; the rows'
shares and the sum of the values: loss_sums.cu; db is finished by column_sums.cu.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from backprop_kernels import checks
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import code
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, plain_variant, variant
from backprop_kernels.cuda.launch import constant, copy, empty, launch, on_device, recording
from backprop_kernels.cuda.part import PART, adds_up, rows_before, rows_of_whole
from backprop_kernels.cuda.rows import THREADS, blocks_for, division
from backprop_kernels.losses import LOSSES

LABELS = {
    "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned",
    "uint64": "unsigned long long",
}  # fmt: skip


def loss(
    Z: Array,
    target: Array,
    name: str = "mse",
    options: Mapping[str, Any] | None = None,
    activation: str = "identity",
    sample_weight: Array | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array, Array | None]:
    """Z (batch, out), target → loss (), dZ (batch, out), db (out) = column sums of dZ.

    The loss is taken of Y = activation(Z). target is (batch, out); for cross_entropy also
    (batch,) class ids; for gaussian_nll (batch, out/2). An empty batch, or weights that sum to
    zero, give a loss and gradients of exactly 0. A class id out of range is an error here; in a
    captured program, which cannot raise, it makes the loss NaN.
    """
    checks.loss(Z, target, name, options or {}, activation, sample_weight, out)
    options = {**LOSSES[name].options, **(options or {})}
    value, dZ, db = out or (None, None, empty(Z.shape[1:], Z.dtype))
    on_device(
        "loss", Z=Z, target=target, sample_weight=sample_weight, out_value=value, out_dZ=dZ,
        out_db=db,
    )  # fmt: skip
    value = empty((), np.float64) if value is None else value
    dZ = empty(Z.shape, Z.dtype) if dZ is None else dZ
    rows, columns = Z.shape
    part = PART.get()
    work = division(rows, columns, rows_of_whole(rows))
    adds_up(work.rows_per_block, "the loss")
    blocks = work.blocks if columns else 0
    partial, values = empty((blocks, columns), Z.dtype), empty((blocks,), np.float64)
    numbers = option_arguments(options, Z.dtype)
    labels, values_of = aim(name, target)
    shares = row_shares(Z.shape, Z.dtype, labels, options, numbers[3], sample_weight)
    if blocks:
        share = Z.dtype.type(1 / (rows if part is None else part.whole))
        common = shares, share, dZ, partial, values, *work.arguments
        grid, block = (blocks,), (THREADS,)
        if name == "cross_entropy":
            launch(
                Unit("loss_cross_entropy.cu", functions(Z.dtype, name, activation, labels)),
                "loss_cross_entropy", grid, block, Z, labels, values_of, *common, numbers[0],
                numbers[3],
            )  # fmt: skip
        elif name == "gaussian_nll":
            unit = Unit("loss_gaussian_nll.cu", variant(Z.dtype, activation))
            launch(unit, "loss_gaussian_nll", grid, block, Z, target, *common)
        else:
            unit = Unit("loss.cu", functions(Z.dtype, name, activation, None))
            launch(unit, "loss", grid, block, Z, target, *common, *numbers)
    sum_up(values, value, Z.dtype)
    if db is not None:
        column_sums(partial, db, before=rows_before())
    return value, dZ, db


def aim(name: str, target: Array) -> tuple[Array | None, Array | None]:
    """(class ids, other targets): one of them."""
    return (target, None) if name == "cross_entropy" and target.ndim == 1 else (None, target)


def option_arguments(options: Mapping[str, Any], dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """The loss's two options as kernels take them: a number and an array by column, twice."""
    given = [value for option, value in options.items() if option != "ignore_index"]
    a, b = (_option(value, dtype) for value in (*given, 0, 0)[:2])
    return *a, *b


def row_shares(
    shape: tuple[int, int], dtype: np.dtype[Any], labels: Array | None,
    options: Mapping[str, Any], class_weight: Array | None, weights: Array | None,
) -> Array | None:  # fmt: skip
    """(rows,): what each row weighs in the mean; None where all weigh the same.

    In a part of a batch, what it weighs among as many rows of weight 1 as the whole batch has; then
    what all rows of the part weigh becomes known too. Checks class ids before anything is written.
    """
    rows, classes = shape
    part = PART.get()
    if not rows or (labels is None and weights is None):
        if part is not None:
            copy(part.mass, np.full(1, rows, np.float64))
        return None
    if part is not None:
        part.weighted = weights is not None or class_weight is not None
    ignored = int(options.get("ignore_index", 0))
    blocks = blocks_for(rows)
    totals, wrong = empty((blocks,), np.float64), empty((blocks,), np.int64)
    shares = empty((rows,), dtype)
    unit, grid, block = _sums(dtype, labels), (blocks,), (THREADS,)
    common = weights, labels, ignored, classes
    launch(unit, "loss_weights", grid, block, *common, class_weight, totals, wrong, rows)
    if labels is not None and not recording() and wrong.get().any():
        checks.class_ids(labels.get(), classes, ignored)
    mass, whole = (None, 0) if part is None else (part.mass, part.whole)
    launch(
        unit, "loss_shares", grid, block, *common, totals, blocks, shares, rows, whole, mass
    )  # fmt: skip
    return shares


def sum_up(values: Array, value: Array, dtype: np.dtype[Any]) -> None:
    """value () = Σ values, in order."""
    launch(_sums(dtype, None), "loss_value", (1,), (THREADS,), values, len(values), value)


def _sums(dtype: np.dtype[Any], labels: Array | None) -> Unit:
    return Unit("loss_sums.cu", plain_variant(dtype) + _labels(labels))


def _labels(labels: Array | None) -> str:
    """A line of variant.cuh: the type of class ids."""
    return f"using label_t = {LABELS['int64' if labels is None else str(labels.dtype)]};\n"


def _option(value: Any, dtype: np.dtype[Any]) -> tuple[Any, Array | None]:
    """(a number for all outputs, an array of one for each); no class weights: each is 1."""
    if np.ndim(value) == 0:
        return dtype.type(1 if value is None else value), None
    return dtype.type(1), constant(value, dtype)


def functions(dtype: Any, name: str, activation: str, labels: Array | None) -> str:
    """variant.cuh of a loss and the output activation."""
    whole_row = LOSSES[name].value is None
    text = variant(dtype, activation) if whole_row else _elementwise(dtype, name, activation)
    return text + _labels(labels)


@cache
def _elementwise(dtype: np.dtype[Any], name: str, activation: str) -> str:
    """variant.cuh: the loss of one output and its derivative, both by z."""
    row, act = LOSSES[name], ACTIVATIONS[activation]
    used = len(row.options)

    def value(z: Any, t: Any, *options: Any) -> Any:
        return row.value(code, act.forward(code, z), t, *options[:used])  # type: ignore[misc]

    def gradient(z: Any, t: Any, *options: Any) -> Any:
        y = act.forward(code, z)
        slope = act.derivative(code, y if act.saves == "Y" else z)
        return row.gradient(code, y, t, *options[:used]) * slope  # type: ignore[misc]

    parameters = ["z", "t", "a", "b"]
    return code.variant(
        dtype,
        code.function("value", parameters, value),
        code.function("gradient", parameters, gradient),
    )
