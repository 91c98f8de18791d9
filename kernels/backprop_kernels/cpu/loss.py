"""loss: value, dZ and db in one pass.  docs/derivations.md#loss

Z (batch, out_features), target, weights (batch)                  read
value (), dZ (batch, out_features), db (out_features)             written
Fused: output activation, softmax or sigmoid, smoothing, class and sample weights, column sums.
Rows go by leaves of LEAF; every leaf leaves a partial value and partial column sums, which are
added in order, so no thread count changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backprop_kernels import checks
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import code
from backprop_kernels.cpu.epilogue import BLOCKS, COLUMNS, PARTIAL, SUMS, column_sums
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit
from backprop_kernels.losses import LOSSES

LEAF = 64  # rows per partial sum
FLOPS = 60  # of one element, roughly: decides how many threads a batch is worth

# Slots. Those of the column sums are epilogue.py's: COLUMNS, PARTIAL, SUMS, BLOCKS.
(WEIGHT_TICKET, LEAF_TICKET, Z_, TARGET, WEIGHT, ROWS, OUTPUTS, VALUE, DZ, VALUES, WEIGHTS, SCALES,
 OPTIONS, IGNORE, FINISH, SUM_ARGS) = range(16)  # fmt: skip


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
    checks.contiguous("loss", Z=Z, target=target, sample_weight=sample_weight)
    options = {**LOSSES[name].options, **(options or {})}
    rows, columns = Z.shape
    value, dZ, db = out or (None, None, scratch(columns, Z.dtype))
    value = np.zeros(()) if value is None else value
    dZ = scratch(Z.shape, Z.dtype) if dZ is None else dZ
    checks.contiguous("loss", out_dZ=dZ, out_db=db)
    ids = name == "cross_entropy" and target.ndim == 1
    if ids:
        checks.class_ids(target, columns, int(options["ignore_index"]))
        target = target.astype(np.int64, copy=False)
    leaves = max(-(-rows // LEAF), 1)
    partial = None if db is None else scratch((leaves, columns), Z.dtype)
    sums: list[Any] = [0] * (BLOCKS + 1)
    sums[COLUMNS], sums[PARTIAL], sums[SUMS], sums[BLOCKS] = columns, partial, db, -(-rows // LEAF)
    arguments = Arguments(
        (
            0, 0, Z, target, sample_weight, rows, columns, value, dZ,
            np.zeros(leaves), np.zeros(leaves), scratch(max(rows, 1), Z.dtype),
            _option_table(name, options, columns, Z.dtype), options.get("ignore_index", 0),
            None if db is None else column_sums(Z.dtype), Arguments(sums),
        )
    )  # fmt: skip
    make: Any = {"cross_entropy": _cross_entropy, "gaussian_nll": _gaussian_nll}.get(
        name, _elementwise
    )
    variant = ids if name == "cross_entropy" else name
    entry = code(make, 4, str(Z.dtype), activation, variant)
    submit(Kernel(entry, arguments, FLOPS * rows * columns))
    return value, dZ, db


def _option_table(name: str, options: Mapping[str, Any], columns: int, dtype: Any) -> Array:
    """(2, columns): the options that are numbers, one per output, in the table's order."""
    table = scratch((2, max(columns, 1)), dtype)
    numbers = [v for option, v in options.items() if option != "ignore_index"]
    for i, value in enumerate(numbers):
        table[i] = 1 if value is None else value  # no class weights: each is 1
    return table


def _kernel(dtype: str, weigh: Any, count: Any, leaf: Any) -> Callable[..., None]:
    """weigh(args, i): row i's weight. count(args, i): what it adds to the mean's divisor.

    leaf(args, first, last) → Σ scaled values; before it, SCALES gets each row's weight over the
    total of the counts.
    """
    from numba import types

    from backprop_kernels.cpu.memory import (
        barrier,
        call_kernel,
        float64s,
        int64s,
        pointer,
        take,
    )

    floats = pointer(getattr(types, dtype))
    real = getattr(types, dtype)

    def kernel(args, sync, thread, threads):
        rows, columns = args[ROWS], args[OUTPUTS]
        values, weights = float64s(args[VALUES]), float64s(args[WEIGHTS])
        scales, dZ = floats(args[SCALES]), floats(args[DZ])
        sums = int64s(args[SUM_ARGS])
        leaves = (rows + LEAF - 1) // LEAF
        taken = 0
        while True:
            t = take(args, WEIGHT_TICKET, leaves, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            total = 0.0
            for i in range(t * LEAF, min((t + 1) * LEAF, rows)):
                total += count(args, i)
            weights[t] = total
        barrier(sync, threads)
        total = 0.0
        for t in range(leaves):
            total += weights[t]
        taken = 0
        while True:
            t = take(args, LEAF_TICKET, leaves, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            first, last = t * LEAF, min((t + 1) * LEAF, rows)
            for i in range(first, last):
                w = weigh(args, i)
                scales[i] = real(0.0 if w == 0.0 or total == 0.0 else w / total)
            values[t] = leaf(args, first, last)
            if args[FINISH] != 0:
                partial = floats(sums[PARTIAL])
                for j in range(columns):
                    partial[t * columns + j] = real(0)
                for i in range(first, last):
                    for j in range(columns):
                        partial[t * columns + j] += dZ[i * columns + j]
        barrier(sync, threads)
        if thread == 0:
            total = 0.0
            for t in range(leaves):
                total += values[t]
            float64s(args[VALUE])[0] = total
        if args[FINISH] != 0:
            call_kernel(args[FINISH], args[SUM_ARGS], sync, thread, threads)

    return kernel


def _row_weight(dtype: str) -> Any:
    """weigh(args, i) for losses whose rows weigh what the caller says, or 1."""
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer

    floats = pointer(getattr(types, dtype))

    @numba.njit(error_model="numpy", _nrt=False)
    def weigh(args, i):
        return types.float64(floats(args[WEIGHT])[i]) if args[WEIGHT] != 0 else 1.0

    return weigh


def _elementwise(dtype: str, activation: str, name: str) -> Callable[..., None]:
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.vector_math import elementwise

    row, act = LOSSES[name], ACTIVATIONS[activation]
    used = len(row.options)
    real = getattr(types, dtype)
    floats = pointer(real)
    saves_Y = act.saves == "Y"

    def value_of_z(m: Any, z: Any, t: Any, *options: Any) -> Any:
        return row.value(m, act.forward(m, z), t, *options[:used])  # type: ignore[misc]

    def gradient_of_z(m: Any, z: Any, t: Any, *options: Any) -> Any:
        y = act.forward(m, z)
        slope = act.derivative(m, y if saves_Y else z)
        return row.gradient(m, y, t, *options[:used]) * slope  # type: ignore[misc]

    value, gradient = elementwise(value_of_z, 4), elementwise(gradient_of_z, 4)

    @numba.njit(error_model="numpy", _nrt=False)
    def leaf(args, first, last):
        """Values go to dZ first: LLVM vectorises the formulas, not a sum."""
        Z, T, dZ = floats(args[Z_]), floats(args[TARGET]), floats(args[DZ])
        scales, options = floats(args[SCALES]), floats(args[OPTIONS])
        columns = args[OUTPUTS]
        share = real(1) / real(columns)
        total = 0.0
        if columns == 1:
            a, b = options[0], options[1]
            for i in range(first, last):
                dZ[i] = value(Z[i], T[i], a, b)
            for i in range(first, last):
                if scales[i] != real(0):
                    total += types.float64(dZ[i]) * types.float64(scales[i])
            for i in range(first, last):
                g = gradient(Z[i], T[i], a, b) * scales[i]
                dZ[i] = real(0) if scales[i] == real(0) else g
            return total
        for i in range(first, last):
            scale, e = scales[i], i * columns
            if scale == real(0):
                for j in range(columns):
                    dZ[e + j] = real(0)
                continue
            for j in range(columns):
                dZ[e + j] = value(Z[e + j], T[e + j], options[j], options[columns + j])
            row_total = 0.0
            for j in range(columns):
                row_total += types.float64(dZ[e + j])
            total += row_total / columns * types.float64(scale)
            for j in range(columns):
                g = gradient(Z[e + j], T[e + j], options[j], options[columns + j])
                dZ[e + j] = g * share * scale
        return total

    weigh = _row_weight(dtype)
    return _kernel(dtype, weigh, weigh, leaf)


def _gaussian_nll(dtype: str, activation: str, name: str) -> Callable[..., None]:
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import pointer
    from backprop_kernels.cpu.vector_math import elementwise

    act = ACTIVATIONS[activation]
    real = getattr(types, dtype)
    floats = pointer(real)
    output = elementwise(act.forward, 1)
    slope = elementwise(act.derivative, 1)
    exp = elementwise(lambda m, x: m.exp(x), 1)
    saves_Y = act.saves == "Y"

    @numba.njit(error_model="numpy", _nrt=False)
    def leaf(args, first, last):
        Z, T, dZ = floats(args[Z_]), floats(args[TARGET]), floats(args[DZ])
        scales, columns = floats(args[SCALES]), args[OUTPUTS]
        half = columns // 2
        total = 0.0
        for i in range(first, last):
            scale, e = scales[i], i * columns
            share = scale / real(half)
            for j in range(half):
                zm, zs = Z[e + j], Z[e + half + j]
                mu, s = output(zm), output(zs)
                d, precision = mu - T[i * half + j], exp(-s)
                square = d * d * precision
                if scale == real(0):
                    dZ[e + j] = real(0)
                    dZ[e + half + j] = real(0)
                    continue
                total += 0.5 * types.float64(s + square) / half * types.float64(scale)
                dZ[e + j] = d * precision * share * slope(mu if saves_Y else zm)
                kept = s if saves_Y else zs
                dZ[e + half + j] = real(0.5) * (real(1) - square) * share * slope(kept)
        return total

    weigh = _row_weight(dtype)
    return _kernel(dtype, weigh, weigh, leaf)


def _cross_entropy(dtype: str, activation: str, ids: bool) -> Callable[..., None]:
    import numba
    from numba import types

    from backprop_kernels.cpu.memory import int64s, pointer
    from backprop_kernels.cpu.vector_math import elementwise

    act = ACTIVATIONS[activation]
    real = getattr(types, dtype)
    floats = pointer(real)
    output, slope = elementwise(act.forward, 1), elementwise(act.derivative, 1)
    exp, log = elementwise(lambda m, x: m.exp(x), 1), elementwise(lambda m, x: m.log(x), 1)
    saves_Y, plain = act.saves == "Y", activation == "identity"
    row_weight = _row_weight(dtype)

    @numba.njit(error_model="numpy", _nrt=False)
    def weigh(args, i):
        """Ignored rows weigh nothing; an id out of range makes the loss NaN."""
        w = row_weight(args, i)
        if ids:
            label = int64s(args[TARGET])[i]
            if label == args[IGNORE]:
                return 0.0
            if label < 0 or label >= args[OUTPUTS]:
                return np.nan  # never an index
        return w

    @numba.njit(error_model="numpy", _nrt=False)
    def count(args, i):
        """Class weights of ids count as sample weights: the mean divides by them too."""
        w = weigh(args, i)
        if ids and w > 0.0:
            w *= types.float64(floats(args[OPTIONS])[args[OUTPUTS] + int64s(args[TARGET])[i]])
        return w

    @numba.njit(error_model="numpy", _nrt=False)
    def leaf(args, first, last):
        Z, dZ, scales = floats(args[Z_]), floats(args[DZ]), floats(args[SCALES])
        columns, options = args[OUTPUTS], floats(args[OPTIONS])
        smoothing = options[0]
        total = 0.0
        for i in range(first, last):
            e = i * columns
            scale = scales[i]
            if scale == real(0) or scale != scale:
                for j in range(columns):
                    dZ[e + j] = scale  # 0, or NaN for a bad id
                total += types.float64(scale)
                continue
            label = 0
            if ids:
                label = int64s(args[TARGET])[i]
            top = output(Z[e])
            for j in range(1, columns):
                y = output(Z[e + j])
                top = y if y > top or y != y else top
            for j in range(columns):
                dZ[e + j] = exp(output(Z[e + j]) - top)
            below = real(0)
            for j in range(columns):
                below += dZ[e + j]
            log_sum, inverse = log(below), real(1) / below
            weight, row_total = real(0), 0.0
            uniform = smoothing / real(columns)
            for j in range(columns):
                p = floats(args[TARGET])[e + j] if not ids else real(1 if j == label else 0)
                q = ((real(1) - smoothing) * p + uniform) * options[columns + j]
                weight += q
                if q != real(0):
                    row_total -= types.float64(q) * types.float64(output(Z[e + j]) - top - log_sum)
            total += row_total * types.float64(scale)
            for j in range(columns):
                p = floats(args[TARGET])[e + j] if not ids else real(1 if j == label else 0)
                q = ((real(1) - smoothing) * p + uniform) * options[columns + j]
                g = (dZ[e + j] * inverse * weight - q) * scale
                if not plain:
                    z = Z[e + j]
                    g = g * slope(output(z) if saves_Y else z)
                dZ[e + j] = g
        return total

    return _kernel(dtype, weigh, count, leaf)
