"""mlp_step: loss and gradients of a whole network.  docs/derivations.md#mlp_step

In bf16 one kernel: mlp_step.cu, which says what it does; what fits it: mlp_fit.py. Rows' shares and
the sum of the loss are loss_sums.cu's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from backprop_kernels import checks, cuda
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, LinearLayer
from backprop_kernels.by_layers import by_layers
from backprop_kernels.cuda import code
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import SAVES
from backprop_kernels.cuda.launch import capability, empty, launch, on_device
from backprop_kernels.cuda.loss import aim, functions, option_arguments, row_shares, sum_up
from backprop_kernels.cuda.mlp_fit import Fit, Place, choose, rows_per_block
from backprop_kernels.cuda.rows import THREADS, WARP, across
from backprop_kernels.errors import OptionError
from backprop_kernels.losses import LOSSES


def mlp_step(
    X: Array,
    target: Array,
    P: Array,
    layers: Sequence[LinearLayer],
    name: str = "mse",
    options: Mapping[str, Any] | None = None,
    sample_weight: Array | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """X (batch, in), target, P (parameters) → loss (), G (parameters) = ∂L/∂P.

    `layers` say where each W and b lie in P. Of G, what belongs to no layer is left alone.
    """
    checks.mlp_step(X, target, P, layers, name, options or {}, sample_weight, out)
    value, G = _results(X, target, P, sample_weight, out)
    return by_layers(cuda, X, target, P, layers, name, options, sample_weight, value, G)


def whole(
    precision: str, X: Array, target: Array, P: Array, layers: Sequence[LinearLayer],
    name: str = "mse", options: Mapping[str, Any] | None = None,
    sample_weight: Array | None = None, out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """`mlp_step` in a precision, of float32 arrays; OptionError where no kernel holds it."""
    checks.mlp_step(X, target, P, layers, name, options or {}, sample_weight, out)
    value, G = _results(X, target, P, sample_weight, out)
    rows, columns = len(X), layers[-1].out_features
    fit, why = choose(layers, name, precision, capability(P), rows)
    if fit is None:
        raise OptionError(f"mlp_step: layers: expected what fits one kernel, got a {why}")
    complete = {**LOSSES[name].options, **(options or {})}
    numbers = option_arguments(complete, X.dtype)
    labels, values_of = aim(name, target)
    shares = row_shares((rows, columns), X.dtype, labels, complete, numbers[3], sample_weight)
    each = rows_per_block(rows)
    blocks = -(-rows // each)
    values, slices = empty((blocks,), np.float64), empty((blocks, len(P)), P.dtype)
    unit = Unit("mlp_step.cu", _variant(layers, fit, name, X.dtype, labels))
    if blocks:
        launch(
            unit, "mlp_step", (blocks,), (THREADS,), X, P, values_of, labels, shares,
            X.dtype.type(1 / rows), values, slices, rows, each, len(P), *numbers,
            shared=fit.shared,
        )  # fmt: skip
    grid = (-(-len(P) // WARP),)
    launch(unit, "mlp_gradients", grid, (THREADS,), slices, G, blocks, len(P))
    sum_up(values, value, X.dtype)
    return value, G


def _results(
    X: Array, target: Array, P: Array, weights: Array | None, out: Any
) -> tuple[Array, Array]:
    value, G = out or (None, None)
    on_device("mlp_step", X=X, target=target, P=P, sample_weight=weights, out_value=value, out_G=G)
    if G is None:
        G = empty(P.shape, P.dtype)
        G.fill(0)
    return empty((), np.float64) if value is None else value, G


def _variant(
    layers: Sequence[LinearLayer], fit: Fit, loss: str, dtype: Any, labels: Array | None
) -> str:
    """variant.cuh: the loss, the activations and the table of layers."""
    last = layers[-1]
    names = sorted({layer.activation for layer in layers})
    numbers = {
        "LAYERS": len(layers), "TILE": fit.tile, "LANES": across(last.out_features),
        "Z_AT": fit.z_at, "D_AT": fit.d_at, "AHEAD_AT": fit.ahead_at,
    }  # fmt: skip
    whole_row = LOSSES[loss].value is None
    return "\n".join(
        [
            functions(dtype, loss, last.activation, labels),
            *(_activation(name) for name in names),
            *(f"constexpr int {name} = {number};" for name, number in numbers.items()),
            f'#define LOSS "{"cross_entropy" if whole_row else "elementwise_loss"}.cuh"',
            "template <int L> struct Layer;",
            *(_layer(i, *pair) for i, pair in enumerate(zip(layers, fit.places, strict=True))),
            "",
        ]
    )


@cache
def _activation(name: str) -> str:
    """A structure with the two functions of an activation."""
    act = ACTIVATIONS[name]
    forward = code.function("activation", ["z"], lambda z: act.forward(code, z))
    derivative = code.function("derivative", ["saved"], lambda saved: act.derivative(code, saved))
    return (
        f"struct act_{name} {{\n    static constexpr int SAVES = {SAVES[act.saves]};\n"
        f"static {forward}static {derivative}}};"
    )


def _layer(number: int, layer: LinearLayer, place: Place) -> str:
    """A row of the table: sizes, where its tensors lie in P, then `place`."""
    numbers = {
        "IN": layer.in_features, "OUT": layer.out_features, "WEIGHT": layer.weight,
        "BIAS": -1 if layer.bias is None else layer.bias,
        **{name.upper(): value for name, value in place._asdict().items()},
    }  # fmt: skip
    return (
        f"template <> struct Layer<{number}> {{\n    using Act = act_{layer.activation};\n"
        f"    static constexpr int {', '.join(f'{k} = {v}' for k, v in numbers.items())};\n}};"
    )
