"""Every argument check of the operators, and the wording of every refusal.

Checks see kind, dtype, shape and layout; never values, with one exception: class ids, which a
kernel would otherwise use to index memory, are checked by `loss` on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backprop_kernels.activations import ACTIVATIONS, WORD, saved_as_bits
from backprop_kernels.arrays import Array, Dropout, LinearLayer
from backprop_kernels.errors import KindError, LabelError, OptionError, ShapeError
from backprop_kernels.losses import LOSSES
from backprop_kernels.optimizers import OPTIMIZERS
from backprop_kernels.precisions import PRECISIONS

GATHERED = ("float32", "float64", "int64")
FLOATS = ("float32", "float64", "complex128")


def choice(where: str, argument: str, value: Any, allowed: Mapping[str, Any]) -> None:
    """Refuse a name that is not in a table, listing the table."""
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(
            f"{where}: {argument}: expected one of {', '.join(allowed)}; got {value!r}"
        )


def integer(where: str, argument: str, value: Any, low: int) -> None:
    """Refuse anything but a whole number from `low` up to what an int64 holds."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value < 2**63:
        raise OptionError(f"{where}: {argument}: expected an integer ≥ {low}, got {value!r}")


def array(where: str, argument: str, value: Array, shape: tuple[Any, ...], dtype: Any) -> None:
    """Refuse an array of another kind, dtype or shape. `shape` may hold (name, size) pairs.

    A bare string in `shape` names a dimension of any size.
    """
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise KindError(f"{where}: {argument}: expected an array, got {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        raise KindError(f"{where}: {argument}: expected dtype {dtype}, got {value.dtype}")
    sizes = [s[1] if isinstance(s, tuple) else s for s in shape]
    actual = value.shape
    if len(actual) != len(sizes) or any(
        not isinstance(size, str) and size != have for size, have in zip(sizes, actual, strict=True)
    ):
        raise ShapeError(f"{where}: {argument}: expected shape {_text(shape)}, got {tuple(actual)}")


def _text(shape: tuple[Any, ...]) -> str:
    parts = [f"{s[0]}={s[1]}" if isinstance(s, tuple) else str(s) for s in shape]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def floating(where: str, argument: str, value: Array, ndim: int) -> None:
    """Refuse anything but a floating-point array with `ndim` dimensions."""
    if not hasattr(value, "dtype") or str(value.dtype) not in FLOATS:
        got = getattr(value, "dtype", type(value).__name__)
        raise KindError(f"{where}: {argument}: expected a float32 or float64 array, got {got}")
    if value.ndim != ndim:
        raise ShapeError(f"{where}: {argument}: expected {ndim} dimensions, got {value.shape}")


def contiguous(where: str, **arrays: Array | None) -> None:
    """Refuse layouts a kernel would misread: it gets a pointer and assumes C order."""
    for name, value in arrays.items():
        if value is not None and not value.flags.c_contiguous:
            raise ShapeError(
                f"{where}: {name}: expected a C-contiguous array, got strides {value.strides} for "
                f"shape {value.shape}; pass numpy.ascontiguousarray({name})"
            )


def named_outputs(out: Sequence[Array | None] | None, *names: str) -> dict[str, Array | None]:
    """`out` by name, for `contiguous`."""
    return {f"out_{name}": value for name, value in zip(names, out or (), strict=False)}


def _epilogue(where: str, activation: str, dropout: Dropout | None) -> None:
    choice(where, "activation", activation, ACTIVATIONS)
    if dropout is None:
        return
    if not 0.0 <= dropout.rate < 1.0:
        raise OptionError(f"{where}: dropout: expected 0 ≤ rate < 1, got {dropout.rate}")
    array(where, "dropout stream", dropout.stream, (("seed and step", 2),), np.dtype(np.int64))


def _outputs(where: str, out: tuple[Array | None, ...] | None, like: dict[str, Any]) -> None:
    """`out` holds one array per name of `like`; None where the caller wants none."""
    if out is None:
        return
    if len(out) != len(like):
        raise ShapeError(
            f"{where}: out: expected {len(like)} arrays ({', '.join(like)}), got {len(out)}"
        )
    for value, (name, (shape, dtype)) in zip(out, like.items(), strict=True):
        if value is not None:
            array(where, f"out {name}", value, shape, dtype)


def gather_rows(X: Array, index: Array, out: Array | None) -> None:
    where = "gather_rows"
    if not hasattr(X, "dtype") or X.dtype not in GATHERED or not X.ndim:
        got = getattr(X, "dtype", type(X).__name__)
        raise KindError(f"{where}: X: expected rows of {', '.join(GATHERED)}, got {got}")
    array(where, "index", index, ("n",), np.dtype(np.int64))
    if not len(X) and len(index):
        raise ShapeError(f"{where}: X: expected at least one row, got shape {X.shape}")
    shape = (("n", len(index)), *(("columns", size) for size in X.shape[1:]))
    _outputs(where, None if out is None else (out,), {"Y": (shape, X.dtype)})


def _operands(where: str, precision: str | None, **operands: Array) -> tuple[Any, Any]:
    """(dtype of a product's operands, dtype of its sums); without `precision` both are X's own."""
    if precision is None:
        for name, value in operands.items():
            floating(where, name, value, 2)
        dtype = next(iter(operands.values())).dtype
        return dtype, dtype
    choice(where, "precision", precision, PRECISIONS)
    row = PRECISIONS[precision]
    for name, value in operands.items():
        array(where, name, value, ("rows", "columns"), np.dtype(row.stored))
    return np.dtype(row.stored), np.dtype(row.real)


def _result(out: Any, stored: Any, real: Any) -> Any:
    """The dtype of Y: `stored`, or as sums are, of the last layer for the loss."""
    Y = out[0] if out else None
    return real if Y is not None and getattr(Y, "dtype", None) == real else stored


def linear_forward(
    X: Array,
    W: Array,
    b: Array | None,
    activation: str,
    dropout: Dropout | None,
    out: Any,
    precision: str | None = None,
    bits: bool = False,
    where: str = "linear_forward",
) -> None:
    stored, real = _operands(where, precision, X=X, W=W)
    batch, in_features = X.shape
    out_features = W.shape[0]
    array(where, "W", W, ("out_features", ("in_features", in_features)), stored)
    if b is not None:
        array(where, "b", b, (("out_features", out_features),), real)
    _epilogue(where, activation, dropout)
    shape = (("batch", batch), ("out_features", out_features))
    saved = _saved(batch, ("out_features", out_features), stored, activation, bits)
    _outputs(where, out, {"Y": (shape, _result(out, stored, real)), "saved": saved})


def _saved(
    rows: int, columns: tuple[str, int], dtype: Any, activation: str, bits: bool
) -> tuple[tuple[Any, ...], Any]:
    """Shape and dtype of what forward saves, in a backend that saves `bits` or in another."""
    if saved_as_bits(activation, bits):
        words = f"{columns[0]} / {WORD} bits", -(-columns[1] // WORD)
        return (("batch", rows), words), np.dtype(np.uint32)
    return (("batch", rows), columns), dtype


def below(
    where: str,
    rows: int,
    columns: int,
    dtype: Any,
    saved: Array | None,
    activation: str,
    dropout: Dropout | None,
    bits: bool,
) -> None:
    """The arguments that describe the layer below, shared by every backward pass."""
    _epilogue(where, activation, dropout)
    if ACTIVATIONS[activation].saves:
        if saved is None:
            raise KindError(
                f"{where}: saved: expected what {activation}'s forward pass saved, got None"
            )
        if saved_as_bits(activation, bits) and getattr(saved, "dtype", None) != np.uint32:
            raise KindError(
                f"{where}: saved: expected the words of bits that {activation}'s forward pass "
                f"saved (uint32), got {getattr(saved, 'dtype', type(saved).__name__)}; pass what "
                "it returned beside Y"
            )
        shape, dtype = _saved(rows, ("in_features", columns), dtype, activation, bits)
        array(where, "saved", saved, shape, dtype)


def linear_dgrad(
    dZ: Array,
    W: Array,
    saved: Array | None,
    activation: str,
    dropout: Dropout | None,
    out: Any,
    precision: str | None = None,
    bits: bool = False,
) -> None:
    where = "linear_dgrad"
    stored, real = _operands(where, precision, dZ=dZ, W=W)
    batch, out_features = dZ.shape
    in_features = W.shape[1]
    array(where, "W", W, (("out_features", out_features), "in_features"), stored)
    below(where, batch, in_features, stored, saved, activation, dropout, bits)
    shape = (("batch", batch), ("in_features", in_features))
    _outputs(where, out, {"dZ_prev": (shape, stored), "db_prev": (shape[1:], real)})


def linear_wgrad(
    dZ: Array, X: Array, out: Array | None, precision: str | None = None,
    where: str = "linear_wgrad",
) -> None:  # fmt: skip
    stored, real = _operands(where, precision, dZ=dZ, X=X)
    array(where, "X", X, (("batch", dZ.shape[0]), "in_features"), stored)
    shape = (("out_features", dZ.shape[1]), ("in_features", X.shape[1]))
    _outputs(where, None if out is None else (out,), {"dW": (shape, real)})


def loss(
    Z: Array,
    target: Array,
    name: str,
    options: Mapping[str, Any],
    activation: str,
    sample_weight: Array | None,
    out: Any,
) -> None:
    where = "loss"
    choice(where, "name", name, LOSSES)
    where = f"loss {name}"
    floating(where, "Z", Z, 2)
    batch, out_features = Z.shape
    if name == "cross_entropy" and target.ndim == 1:
        array(where, "target", target, (("batch", batch),), None)
        if target.dtype.kind not in "iu":
            raise KindError(f"{where}: target: expected integer class ids, got {target.dtype}")
    else:
        per_row = out_features
        if name == "gaussian_nll":
            if out_features % 2:
                raise ShapeError(
                    f"{where}: Z: expected an even number of columns (mu, log variance), got "
                    f"{Z.shape}"
                )
            per_row //= 2
        array(where, "target", target, (("batch", batch), ("outputs", per_row)), Z.real.dtype)
    unknown = set(options) - set(LOSSES[name].options)
    if unknown:
        raise OptionError(
            f"{where}: options: expected only {', '.join(LOSSES[name].options) or 'none'}; "
            f"got {', '.join(sorted(unknown))}"
        )
    for option, value in options.items():
        if isinstance(value, np.ndarray) and value.ndim:
            array(where, option, value, (("out_features", out_features),), None)
    _epilogue(where, activation, None)
    if sample_weight is not None:
        array(where, "sample_weight", sample_weight, (("batch", batch),), Z.real.dtype)
    shape = (("batch", batch), ("out_features", out_features))
    value = Z.dtype if Z.dtype.kind == "c" else np.dtype(np.float64)
    _outputs(where, out, {"value": ((), value), "dZ": (shape, Z.dtype), "db": (shape[1:], Z.dtype)})


def class_ids(target: Array, classes: int, ignore_index: int) -> None:
    """Refuse class ids outside 0 … classes − 1, naming the first."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        row = int(wrong.argmax())
        raise LabelError(
            f"loss cross_entropy: target: expected class ids 0 … {classes - 1}, "
            f"got {int(target[row])} at row {row} ({int(wrong.sum())} such row(s))"
        )


def optimizer_step(
    P: Array,
    G: Array,
    state: Any,
    scalars: Array,
    rule: str,
    guard: Array | None,
    out: Any,
    spans: Sequence[tuple[int, int, int]] | None,
) -> None:
    where = "optimizer_step"
    choice(where, "rule", rule, OPTIMIZERS)
    floating(where, "P", P, 1)
    same = (("parameters", P.shape[0]),)
    array(where, "G", G, same, P.dtype)
    names = OPTIMIZERS[rule].state
    if len(state) != len(names):
        raise ShapeError(
            f"{where}: state: expected {len(names)} arrays ({', '.join(names)}), got {len(state)}"
        )
    for name, value in zip(names, state, strict=True):
        array(where, name, value, same, P.dtype)
    row, double = OPTIMIZERS[rule], np.dtype(np.float64)
    count = 1 + len(row.scalars(1, **row.options))
    if spans is None:
        array(where, "scalars", scalars, ((f"max_norm and those of {rule}", count),), double)
    else:
        columns = (f"max_norm, max_value, l1, l2 and those of {rule}", count + 3)
        array(where, "scalars", scalars, ("rows", columns), double)
        _spans(where, spans, P.shape[0], scalars.shape[0])
    if guard is not None:
        array(where, "guard", guard, (), double)
    _outputs(where, None if out is None else (out,), {"norm": ((), double)})


def _spans(where: str, spans: Sequence[tuple[int, int, int]], size: int, rows: int) -> None:
    """Spans index memory, so that they are checked by value: rising, apart, inside."""
    end = 0
    for i, span in enumerate(spans):
        good = len(span) == 3 and end <= span[0] <= span[1] <= size and 0 <= span[2] < rows
        if not good:
            raise ShapeError(
                f"{where}: spans[{i}]: expected (start, stop, row) with {end} ≤ start ≤ stop ≤ "
                f"{size} and 0 ≤ row < {rows}, got {tuple(span)}"
            )
        end = span[1]


def mlp_step(
    X: Array,
    target: Array,
    P: Array,
    layers: Sequence[LinearLayer],
    name: str,
    options: Mapping[str, Any],
    sample_weight: Array | None,
    out: Any,
) -> None:
    where = "mlp_step"
    floating(where, "X", X, 2)
    size = ("parameters", P.shape[0] if getattr(P, "ndim", 0) == 1 else 0)
    array(where, "P", P, (size,), X.dtype)
    if not layers:
        raise ShapeError(f"{where}: layers: expected at least one, got none")
    width = X.shape[1]
    for i, layer in enumerate(layers):
        choice(f"{where}: layers[{i}]", "activation", layer.activation, ACTIVATIONS)
        if layer.in_features != width:
            raise ShapeError(
                f"{where}: layers[{i}]: expected in_features={width}, what it is given; got "
                f"{layer.in_features}"
            )
        width = layer.out_features
        for tensor, start, count in (
            ("weight", layer.weight, width * layer.in_features),
            ("bias", layer.bias, width),
        ):
            if start is not None and not 0 <= start <= P.shape[0] - count:
                raise ShapeError(
                    f"{where}: layers[{i}]: {tensor}: expected {count} of the {P.shape[0]} "
                    f"parameters, got {start} … {start + count}"
                )
    Z = np.broadcast_to(np.zeros((), X.dtype), (X.shape[0], width))  # what the loss is taken of
    loss(Z, target, name, options, layers[-1].activation, sample_weight, None)
    value = X.dtype if X.dtype.kind == "c" else np.dtype(np.float64)
    _outputs(where, out, {"value": ((), value), "G": ((size,), P.dtype)})


def norm_forward(
    where: str,
    X: Array,
    gamma: Array,
    beta: Array,
    activation: str,
    dropout: Dropout | None,
    out: Any,
    statistics: int,
    bits: bool = False,
    precision: str | None = None,
    **running: Array,
) -> None:
    """Both norms; `statistics` is the axis length of mean and rstd: features, or batch."""
    stored, real = _operands(where, precision, X=X)
    features = (("features", X.shape[1]),)
    for name, value in {"gamma": gamma, "beta": beta, **running}.items():
        array(where, name, value, features, real)
    _epilogue(where, activation, dropout)
    shape = (("batch", X.shape[0]), *features)
    per = (("statistics", statistics),)
    _outputs(where, out, {
        "Y": (shape, _result(out, stored, real)),
        "saved": _saved(len(X), features[0], stored, activation, bits),
        "mean": (per, real), "rstd": (per, real),
    })  # fmt: skip


def norm_backward(
    where: str,
    dZ: Array,
    X: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    saved: Array | None,
    activation: str,
    dropout: Dropout | None,
    out: Any,
    statistics: int,
    bits: bool = False,
    precision: str | None = None,
) -> None:
    stored, real = _operands(where, precision, dZ=dZ)
    shape = (("batch", dZ.shape[0]), ("features", dZ.shape[1]))
    array(where, "X", X, shape, stored)
    array(where, "gamma", gamma, shape[1:], real)
    for name, value in (("mean", mean), ("rstd", rstd)):
        array(where, name, value, (("statistics", statistics),), real)
    below(where, dZ.shape[0], dZ.shape[1], stored, saved, activation, dropout, bits)
    _outputs(where, out, {
        "dZ_prev": (shape, stored), "db_prev": (shape[1:], real), "dgamma": (shape[1:], real),
    })  # fmt: skip
