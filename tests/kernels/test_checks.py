"""What each operator refuses, word for word, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.errors import BackpropError, KindError, OptionError, ShapeError
from backprop_kernels.losses import LOSSES
from backprop_kernels.optimizers import OPTIMIZERS

STREAM = np.zeros(2, np.int64)


def f(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def d(*shape: int) -> Array:
    return np.ones(shape, np.float64)


ids = np.zeros(2, np.int64)
names = ", ".join(ACTIVATIONS)

# what is called, the error, its words
Case = tuple[Callable[[ModuleType], Any], type[BackpropError], str]
CASES: list[Case] = [
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 5)),
        ShapeError,
        "linear_forward: W: expected shape (out_features, in_features=3), got (4, 5)",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), d(4, 3)),
        KindError,
        "linear_forward: W: expected dtype float32, got float64",
    ),
    (
        lambda k: k.linear_forward(f(3), f(4, 3)),
        ShapeError,
        "linear_forward: X: expected 2 dimensions, got (3,)",
    ),
    (
        lambda k: k.linear_forward(np.ones((2, 3), int), f(4, 3)),
        KindError,
        "linear_forward: X: expected a float32 or float64 array, got int64",
    ),
    (
        lambda k: k.linear_forward([[1.0]], f(1, 1)),
        KindError,
        "linear_forward: X: expected a float32 or float64 array, got list",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), f(3)),
        ShapeError,
        "linear_forward: b: expected shape (out_features=4,), got (3,)",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), [0.0] * 4),
        KindError,
        "linear_forward: b: expected an array, got list",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), None, "swish"),
        OptionError,
        f"linear_forward: activation: expected one of {names}; got 'swish'",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), None, "relu", Dropout(1.0, STREAM, 0)),
        OptionError,
        "linear_forward: dropout: expected 0 ≤ rate < 1, got 1.0",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), None, "relu", Dropout(0.5, d(2), 0)),
        KindError,
        "linear_forward: dropout stream: expected dtype int64, got float64",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), out=(f(2, 3), None)),
        ShapeError,
        "linear_forward: out Y: expected shape (batch=2, out_features=4), got (2, 3)",
    ),
    (
        lambda k: k.linear_forward(f(2, 3), f(4, 3), out=(f(2, 4),)),
        ShapeError,
        "linear_forward: out: expected 2 arrays (Y, saved), got 1",
    ),
    (
        lambda k: k.linear_dgrad(f(2, 4), f(3, 5)),
        ShapeError,
        "linear_dgrad: W: expected shape (out_features=4, in_features), got (3, 5)",
    ),
    (
        lambda k: k.linear_dgrad(f(2, 4), f(4, 3), None, "relu"),
        KindError,
        "linear_dgrad: saved: expected what relu's forward pass saved, got None",
    ),
    (
        lambda k: k.linear_dgrad(f(2, 4), f(4, 3), f(2, 4), "tanh"),
        ShapeError,
        "linear_dgrad: saved: expected shape (batch=2, in_features=3), got (2, 4)",
    ),
    (
        lambda k: k.linear_dgrad(f(2, 4), f(4, 3), out=(f(2, 3), d(3))),
        KindError,
        "linear_dgrad: out db_prev: expected dtype float32, got float64",
    ),
    (
        lambda k: k.linear_wgrad(f(2, 4), f(3, 5)),
        ShapeError,
        "linear_wgrad: X: expected shape (batch=2, in_features), got (3, 5)",
    ),
    (
        lambda k: k.linear_wgrad(f(2, 4), f(2, 5), out=f(5, 4)),
        ShapeError,
        "linear_wgrad: out dW: expected shape (out_features=4, in_features=5), got (5, 4)",
    ),
    (
        lambda k: k.loss(f(2, 3), f(2, 3), "l2"),
        OptionError,
        f"loss: name: expected one of {', '.join(LOSSES)}; got 'l2'",
    ),
    (
        lambda k: k.loss(f(4, 1), f(4), "mse"),
        ShapeError,
        "loss mse: target: expected shape (batch=4, outputs=1), got (4,)",
    ),
    (
        lambda k: k.loss(f(2, 3), d(2, 3), "mse"),
        KindError,
        "loss mse: target: expected dtype float32, got float64",
    ),
    (
        lambda k: k.loss(f(2, 3), np.zeros(3, int), "cross_entropy"),
        ShapeError,
        "loss cross_entropy: target: expected shape (batch=2,), got (3,)",
    ),
    (
        lambda k: k.loss(f(2, 3), f(2), "cross_entropy"),
        KindError,
        "loss cross_entropy: target: expected integer class ids, got float32",
    ),
    (
        lambda k: k.loss(f(2, 3), f(2, 1), "gaussian_nll"),
        ShapeError,
        "loss gaussian_nll: Z: expected an even number of columns (mu, log variance), got (2, 3)",
    ),
    (
        lambda k: k.loss(f(2, 3), f(2, 3), "mse", {"delta": 1.0, "beta": 2.0}),
        OptionError,
        "loss mse: options: expected only none; got beta, delta",
    ),
    (
        lambda k: k.loss(f(2, 3), ids, "cross_entropy", {"class_weight": d(2)}),
        ShapeError,
        "loss cross_entropy: class_weight: expected shape (out_features=3,), got (2,)",
    ),
    (
        lambda k: k.loss(f(2, 3), f(2, 3), "mse", None, "identity", f(3)),
        ShapeError,
        "loss mse: sample_weight: expected shape (batch=2,), got (3,)",
    ),
    (
        lambda k: k.loss(f(2, 3), f(2, 3), "mse", out=(f(), f(2, 3), f(3))),
        KindError,
        "loss mse: out value: expected dtype float64, got float32",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(4), (f(3),), d(6), "SGD"),
        ShapeError,
        "optimizer_step: G: expected shape (parameters=3,), got (4,)",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(3), (), d(6), "Adam"),
        ShapeError,
        "optimizer_step: state: expected 2 arrays (exp_avg, exp_avg_sq), got 0",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(3), (f(3), d(3)), d(9), "Adam"),
        KindError,
        "optimizer_step: exp_avg_sq: expected dtype float32, got float64",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(3), (f(3),), f(6), "SGD"),
        KindError,
        "optimizer_step: scalars: expected dtype float64, got float32",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(3), (f(3),), d(5), "SGD"),
        ShapeError,
        "optimizer_step: scalars: expected shape (max_norm and those of SGD=6,), got (5,)",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(3), (f(3),), d(6), "SGD", f()),
        KindError,
        "optimizer_step: guard: expected dtype float64, got float32",
    ),
    (
        lambda k: k.optimizer_step(f(3), f(3), (f(3),), d(6), "sgd"),
        OptionError,
        f"optimizer_step: rule: expected one of {', '.join(OPTIMIZERS)}; got 'sgd'",
    ),
    (
        lambda k: k.layer_norm_forward(f(2, 3), f(2), f(3)),
        ShapeError,
        "layer_norm_forward: gamma: expected shape (features=3,), got (2,)",
    ),
    (
        lambda k: k.layer_norm_backward(f(2, 3), f(2, 3), f(3), f(3), f(2)),
        ShapeError,
        "layer_norm_backward: mean: expected shape (statistics=2,), got (3,)",
    ),
    (
        lambda k: k.batch_norm_forward(f(2, 3), f(3), d(3), f(3), f(3)),
        KindError,
        "batch_norm_forward: beta: expected dtype float32, got float64",
    ),
    (
        lambda k: k.batch_norm_backward(f(2, 3), f(3, 2), f(3), f(3), f(3)),
        ShapeError,
        "batch_norm_backward: X: expected shape (batch=2, features=3), got (3, 2)",
    ),
    (
        lambda k: k.batch_norm_forward(f(2, 3), f(3), f(3), f(2), f(3)),
        ShapeError,
        "batch_norm_forward: running_mean: expected shape (features=3,), got (2,)",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=[c[2][:60] for c in CASES])
def test_refusal(
    backend: ModuleType, call: Callable[[ModuleType], Any], kind: type[BackpropError], message: str
) -> None:
    with pytest.raises(kind) as error:
        call(backend)
    assert str(error.value) == message
    assert isinstance(error.value, TypeError if kind is KindError else ValueError)


def strided(array: Array) -> Array:
    """The same numbers, two elements apart."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


# Each operator with all of its arrays by name; outputs are `out_…`.
CALLS: dict[str, tuple[dict[str, Array], Callable[[Any, dict[str, Array]], Any]]] = {
    "linear_forward": (
        {"X": f(2, 3), "W": f(4, 3), "b": f(4), "out_Y": f(2, 4), "out_saved": f(2, 4)},
        lambda k, a: k.linear_forward(
            a["X"], a["W"], a["b"], "gelu", None, (a["out_Y"], a["out_saved"])
        ),
    ),
    "linear_dgrad": (
        {
            "dZ": f(2, 4), "W": f(4, 3), "saved": f(2, 3), "out_dZ_prev": f(2, 3),
            "out_db_prev": f(3),
        },
        lambda k, a: k.linear_dgrad(
            a["dZ"], a["W"], a["saved"], "gelu", None, (a["out_dZ_prev"], a["out_db_prev"])
        ),
    ),
    "linear_wgrad": (
        {"dZ": f(2, 4), "X": f(2, 3), "out": f(4, 3)},
        lambda k, a: k.linear_wgrad(a["dZ"], a["X"], a["out"]),
    ),
    "loss": (
        {
            "Z": f(2, 4), "target": f(2, 4), "sample_weight": f(2), "out_dZ": f(2, 4),
            "out_db": f(4),
        },
        lambda k, a: k.loss(
            a["Z"], a["target"], "mse", None, "identity", a["sample_weight"],
            (d(), a["out_dZ"], a["out_db"]),
        ),
    ),
    "optimizer_step": (
        {"P": f(4), "G": f(4), "exp_avg": f(4), "exp_avg_sq": f(4), "scalars": d(9)},
        lambda k, a: k.optimizer_step(
            a["P"], a["G"], (a["exp_avg"], a["exp_avg_sq"]), a["scalars"], "Adam"
        ),
    ),
    "layer_norm_forward": (
        {
            "X": f(2, 4), "gamma": f(4), "beta": f(4), "out_Y": f(2, 4), "out_saved": f(2, 4),
            "out_mean": f(2), "out_rstd": f(2),
        },
        lambda k, a: k.layer_norm_forward(
            a["X"], a["gamma"], a["beta"], 1e-5, "gelu", None,
            (a["out_Y"], a["out_saved"], a["out_mean"], a["out_rstd"]),
        ),
    ),
    "layer_norm_backward": (
        {
            "dZ": f(2, 4), "X": f(2, 4), "gamma": f(4), "mean": f(2), "rstd": f(2),
            "saved": f(2, 4), "out_dZ_prev": f(2, 4), "out_db_prev": f(4), "out_dgamma": f(4),
        },
        lambda k, a: k.layer_norm_backward(
            a["dZ"], a["X"], a["gamma"], a["mean"], a["rstd"], a["saved"], "gelu", None,
            (a["out_dZ_prev"], a["out_db_prev"], a["out_dgamma"]),
        ),
    ),
    "batch_norm_forward": (
        {
            "X": f(2, 4), "gamma": f(4), "beta": f(4), "running_mean": f(4), "running_var": f(4),
            "out_Y": f(2, 4), "out_saved": f(2, 4), "out_mean": f(4), "out_rstd": f(4),
        },
        lambda k, a: k.batch_norm_forward(
            a["X"], a["gamma"], a["beta"], a["running_mean"], a["running_var"], True, 0.1, 1e-5,
            "gelu", None, (a["out_Y"], a["out_saved"], a["out_mean"], a["out_rstd"]),
        ),
    ),
    "batch_norm_backward": (
        {
            "dZ": f(2, 4), "X": f(2, 4), "gamma": f(4), "mean": f(4), "rstd": f(4),
            "saved": f(2, 4), "out_dZ_prev": f(2, 4), "out_db_prev": f(4), "out_dgamma": f(4),
        },
        lambda k, a: k.batch_norm_backward(
            a["dZ"], a["X"], a["gamma"], a["mean"], a["rstd"], a["saved"], "gelu", None,
            (a["out_dZ_prev"], a["out_db_prev"], a["out_dgamma"]),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "argument"), [(o, a) for o, (arrays, _) in CALLS.items() for a in arrays]
)
def test_compiled_kernels_refuse_layouts_they_would_misread(operator: str, argument: str) -> None:
    """A kernel gets a pointer and assumes C order. (The reference takes any layout.)"""
    from backprop_kernels import cpu

    arrays, call = CALLS[operator]
    call(cpu, arrays)
    wrong = strided(arrays[argument])
    with pytest.raises(ShapeError) as error:
        call(cpu, {**arrays, argument: wrong})
    assert str(error.value) == (
        f"{operator}: {argument}: expected a C-contiguous array, got strides {wrong.strides} for "
        f"shape {wrong.shape}; pass numpy.ascontiguousarray({argument})"
    )
