"""A loss with its options, checked against the loss table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import DataError, KindError, LabelError, OptionError, ShapeError
from backprop_kernels.losses import LOSSES, TARGETS

from backprop.batches import Rows, is_streamed
from backprop.memory import HOST, Memory, contiguous, on_gpu

# Options of one number per output, by the dimensions they may have.
PER_OUTPUT = {"class_weight": (1,), "pos_weight": (0, 1)}
RANGES = {
    "delta": (1e-30, np.inf),
    "q": (0.0, 1.0),
    "label_smoothing": (0.0, 1.0),
    "alpha": (0.0, 1.0),
    "gamma": (0.0, np.inf),
    "class_weight": (0.0, np.inf),
    "pos_weight": (0.0, np.inf),
}


class Loss:
    """`Loss("cross_entropy", label_smoothing=0.1)`: a name from the loss table and its options.

    Wherever a `loss=` is taken, the bare name does when the defaults do.
    Every loss is the weighted mean over the rows; see docs/derivations.md#loss.
    """

    def __init__(self, name: str, **options: Any) -> None:
        checks.choice("Loss", "name", name, LOSSES)
        self.name = name
        known = LOSSES[name].options
        for option, value in options.items():
            if option not in known:
                raise OptionError(
                    f"Loss {name}: options: expected {', '.join(known) or 'none'}; got {option!r}"
                )
            options[option] = _option(f"Loss {name}", option, value, known[option])
        self.options: dict[str, Any] = {**known, **options}

    def __repr__(self) -> str:
        known = LOSSES[self.name].options
        changed = [f", {k}={v!r}" for k, v in self.options.items() if np.any(v != known[k])]
        return f"Loss({self.name!r}{''.join(changed)})"

    def targets(
        self, y: Any, batch: int, out_features: int, dtype: Any, memory: Memory = HOST,
        look: bool = True,
    ) -> Array:  # fmt: skip
        """`y` as the kernels take it, or an error that names the first bad row.

        Accepts (batch,) or (batch, 1) for a single output, (batch, outputs) for several, and for
        cross_entropy class ids (batch,) or class probabilities (batch, classes). Without `look`
        NaN and wrong class ids are left to the kernel, which makes the loss NaN.
        """
        y = as_numbers(f"loss {self.name}", "y", y, memory)
        outputs = out_features
        if self.name == "gaussian_nll":
            if out_features % 2:
                raise ShapeError(
                    "loss gaussian_nll: model: expected an even number of outputs (mu, log "
                    f"variance), got {out_features}"
                )
            outputs //= 2
        if self.name == "cross_entropy" and y.ndim == 1:
            self._rows(y, batch, f"({batch},) class ids or ({batch}, {outputs})")
            return self._class_ids(y, out_features, look)
        expected = f"({batch}, {outputs})" + (f" or ({batch},)" if outputs == 1 else "")
        if self.name == "cross_entropy":
            expected = f"({batch},) class ids or ({batch}, {outputs}) probabilities"
        if y.shape[1:] != (outputs,) and not (y.ndim == 1 and outputs == 1):
            raise ShapeError(f"loss {self.name}: y: expected shape {expected}, got {y.shape}")
        self._rows(y, batch, expected)
        y = y.reshape(batch, outputs)
        if look:
            refuse_non_finite(f"loss {self.name}", "y", y)
        self._in_range(y)
        return contiguous(y, dtype)

    def mass(self, target: Array, weight: Array | None = None) -> float:
        """What the mean over these rows divides by: their weights and those of their classes."""
        w = np.ones(len(target)) if weight is None else weight.astype(np.float64)
        if self.name == "cross_entropy" and target.ndim == 1:
            counted = target != self.options["ignore_index"]
            w = w * counted
            if self.options["class_weight"] is not None:
                w = w * self.options["class_weight"][np.where(counted, target, 0)]
        return float(w.sum())

    def column(self, y: Any, rows: int, out_features: int, dtype: Any) -> Array | Rows:
        """`targets` of all rows; of several streamed columns, as they will be read and checked."""
        if not is_streamed(y) or math.prod(y.shape[1:]) == 1:
            return self.targets(y, rows, out_features, dtype)
        self._rows(y, rows, f"({rows}, {out_features})")
        return Rows(y, lambda part, known: self.targets(part, len(part), out_features, dtype))

    def _rows(self, y: Any, batch: int, expected: str) -> None:
        if y.shape[0] != batch:
            raise ShapeError(
                f"loss {self.name}: y: expected shape {expected}, one row per row of X, "
                f"got {y.shape}"
            )

    def _class_ids(self, y: Array, classes: int, look: bool) -> Array:
        if on_gpu(y):
            if y.dtype.kind not in "iu":
                raise KindError(
                    f"loss {self.name}: y: expected class ids as integers, got dtype {y.dtype}"
                )
            if look:
                self._class_ids(y.get(), classes, look)
            return contiguous(y, np.int64)
        if y.dtype == np.int64 and y.size and np.maximum.reduce(y.view(np.uint64)) < classes:
            return np.ascontiguousarray(y)  # as most are: one look, for none is negative either
        ids = y.astype(np.int64, copy=False) if y.dtype.kind in "iub" else np.trunc(y)
        ignored = ids == self.options["ignore_index"]
        with np.errstate(invalid="ignore"):
            wrong = ~ignored & ((ids < 0) | (ids >= classes) | (ids != y))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise LabelError(
                f"loss {self.name}: y: expected class ids 0 … {classes - 1}, got {y[row]} at row "
                f"{row} ({int(wrong.sum())} such row(s))"
            )
        return np.ascontiguousarray(ids, np.int64)

    def _in_range(self, y: Array) -> None:
        kind = LOSSES[self.name].targets
        inside = {
            "counts": lambda: y >= 0,
            "probability": lambda: (y >= 0) & (y <= 1),
            "classes": lambda: (y >= 0) & (y <= 1),
            "binary": lambda: (y == 0) | (y == 1),
            "sign": lambda: (y == -1) | (y == 1),
        }
        if kind in inside and not (good := inside[kind]()).all():
            y = in_host_memory(y)
            row, column = (int(i) for i in np.argwhere(~in_host_memory(good))[0])
            raise LabelError(
                f"loss {self.name}: y: expected {TARGETS[kind]}; got {y[row, column]} at row {row}"
                f"{f', column {column}' if y.shape[1] > 1 else ''}"
            )


def _option(where: str, option: str, value: Any, default: Any) -> Any:
    """`value` as the kernels take it: an integer, a float, or float64 numbers per output."""
    if value is None and default is None:
        return None
    if option == "ignore_index":
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise OptionError(f"{where}: {option}: expected an integer, got {value!r}")
        return int(value)
    dimensions = PER_OUTPUT.get(option, (0,))
    numbers = as_numbers(where, option, value).astype(np.float64)
    if numbers.ndim not in dimensions:
        expected = "one number per class" if 0 not in dimensions else "a number"
        raise OptionError(f"{where}: {option}: expected {expected}, got {value!r}")
    low, high = RANGES.get(option, (-np.inf, np.inf))
    if not (np.isfinite(numbers) & (numbers >= low) & (numbers <= high)).all():
        interval = f"[{low}, {high}]" if np.isfinite(high) else f"[{low}, inf)"
        raise OptionError(f"{where}: {option}: expected numbers in {interval}, got {value!r}")
    return numbers if numbers.ndim else float(numbers)


def resolve_loss(loss: str | Loss) -> Loss:
    """A `Loss`, from one or from its name."""
    if isinstance(loss, Loss):
        return loss
    checks.choice("loss", "name", loss, LOSSES)
    return Loss(loss)


def as_numbers(where: str, argument: str, value: Any, memory: Memory = HOST) -> Array:
    """`value` as a numeric array of NumPy's or of `memory`, or an error that says what came."""
    if on_gpu(value):
        array = memory.taken(where, argument, value)
        _expect_numbers(where, argument, array)
        return array
    try:
        array = np.asarray(value)
    except ValueError as problem:  # ragged lists
        raise ShapeError(f"{where}: {argument}: expected a rectangular array; {problem}") from None
    _expect_numbers(where, argument, array)
    return array


def _expect_numbers(where: str, argument: str, array: Array) -> None:
    if array.dtype.kind not in "fiub":
        raise KindError(
            f"{where}: {argument}: expected numbers, got dtype {array.dtype}"
            + (
                "; encode text columns first (`backprop fit` does)"
                if array.dtype.kind in "OUS" and argument in ("X", "y")
                else ""
            )
        )


def in_host_memory(array: Array) -> Array:
    """`array` for NumPy to read."""
    return array.get() if on_gpu(array) else array


def refuse_non_finite(where: str, argument: str, array: Array) -> None:
    """Refuse NaN and infinity, naming the first cell and how many there are."""
    if array.dtype.kind != "f":
        return
    # One pass over memory in the good case: a sum is finite unless a term is not (or it overflows).
    # In the array's own dtype: another would allocate a buffer on every step.
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum()):
            return
    array = in_host_memory(array)
    bad = ~np.isfinite(array)
    if bad.any():
        first = np.argwhere(bad)[0]
        what = "NaN" if np.isnan(array[tuple(first)]) else "infinity"
        place = f"row {first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")
        raise DataError(
            f"{where}: {argument}: expected finite numbers, got {what} at {place} "
            f"({int(bad.sum()):,} of {array.size:,}); impute or drop such rows"
        )


def options_for_kernel(loss: Loss, out_features: int) -> Mapping[str, Any]:
    """The options, per-output ones checked against the width of the network."""
    for option in PER_OUTPUT:
        value = loss.options.get(option)
        if isinstance(value, np.ndarray) and value.shape != (out_features,):
            raise ShapeError(
                f"loss {loss.name}: {option}: expected shape ({out_features},), got {value.shape}"
            )
    return loss.options
