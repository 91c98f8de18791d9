"""Whole networks, for mlp_step: tables of layers, and what they compute in bf16, with bounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from backprop_kernels import reference
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, LinearLayer
from backprop_kernels.precisions import round_to, widen
from backprop_kernels.reference import array_math as m

from tests.guarded import Guards
from tests.tolerances import FORMULA, activation_bound, assert_within, gamma, unit

F32 = np.dtype(np.float32)
U = unit(F32)


class Network(NamedTuple):
    """A table of layers with gaps between the tensors, and the size of the flat parameters."""

    layers: list[LinearLayer]
    size: int

    @classmethod
    def of(
        cls, widths: Sequence[int], activations: str | Sequence[str] = "relu",
        without_bias: Sequence[int] = (),
    ) -> Network:  # fmt: skip
        """Activations of all layers; of one, those of the hidden ones."""
        if isinstance(activations, str):
            activations = [activations] * (len(widths) - 2) + ["identity"]
        end, layers = 5, []
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            bias = None if i in without_bias else end + fan_in * fan_out + 3
            layers.append(LinearLayer(fan_in, fan_out, end, bias, activations[i]))
            end += fan_in * fan_out + fan_out + 7
        return cls(layers, end)

    def tensors(self, P: Array) -> list[tuple[Array, Array]]:
        found = []
        for x in self.layers:
            W = P[x.weight : x.weight + x.in_features * x.out_features]
            b = np.zeros(x.out_features) if x.bias is None else P[x.bias : x.bias + x.out_features]
            found.append((W.reshape(x.out_features, x.in_features), b))
        return found

    def used(self) -> Array:
        """Which parameters belong to a layer."""
        found = np.zeros(self.size, bool)
        for x in self.layers:
            found[x.weight : x.weight + x.in_features * x.out_features] = True
            if x.bias is not None:
                found[x.bias : x.bias + x.out_features] = True
        return found


def targets(loss: str, rng: np.random.Generator, rows: int, outputs: int) -> Array:
    if loss == "cross_entropy":
        return rng.integers(0, outputs, rows)
    if loss == "bce_with_logits":
        return rng.random((rows, outputs)).astype(F32)
    return rng.standard_normal((rows, outputs)).astype(F32)


def run(
    backend: Any, network: Network, X: Array, target: Array, P: Array, loss: str = "mse",
    options: Any = None, weight: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """On guarded arrays; what belongs to no layer is checked to be left alone."""
    guards = Guards(len(X) % 2)
    value = guards.output((), np.dtype(np.float64))
    G = guards.inout(np.full(network.size, 7, P.dtype))
    backend.mlp_step(
        guards.input(X), guards.input(target), guards.input(P), network.layers, loss, options,
        guards.input(weight), out=(value, G),
    )  # fmt: skip
    guards.check()
    assert (G[~network.used()] == 7).all()
    return value, np.where(network.used(), G, 0)


# ---- what is computed, and how far from it the kernel may be


def rounded(x: Array, error: Array) -> tuple[Array, Array]:
    """(x as bf16, how far from that may be what is within `error` of x when it is rounded)."""
    middle, low, high = (
        widen(round_to(a.astype(F32), "bf16")).astype(float) for a in (x, x - error, x + error)
    )
    return middle, np.maximum(middle - low, high - middle)


def product(
    A: Array, A_error: Array, B: Array, B_error: Array | float = 0.0
) -> tuple[Array, Array]:
    """A B and a bound on its error. Twice γ: tensor cores may cut digits off where others round."""
    size = np.abs(A) @ np.abs(B)
    carried = A_error @ np.abs(B)
    if not np.isscalar(B_error):
        carried = carried + (np.abs(A) + A_error) @ np.asarray(B_error)
    return A @ B, carried + 2 * gamma(A.shape[1] + 16, F32) * (size + carried)


def bounded(
    network: Network, X: Array, target: Array, P: Array, loss: str, options: Any,
    weight: Array | None,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:  # fmt: skip
    """(loss, its bound), (G, its bound): all operands rounded to bf16, all else exact."""
    tensors = [(rounded(W, 0 * W)[0], b.astype(float)) for W, b in network.tensors(P)]
    Y = rounded(X, 0 * X)
    inputs, saved = [Y], []
    for layer, (W, b) in zip(network.layers, tensors, strict=True):
        z, error = product(*Y, W.T)
        z, error = z + b, error + 2 * U * (np.abs(z) + np.abs(b))
        act = ACTIVATIONS[layer.activation]
        if layer is network.layers[-1]:
            break
        a = act.forward(m, z)
        ends = [act.forward(m, z + side * error) for side in (-1, 1)]
        slope = np.maximum(*(np.abs(end - a) for end in ends)) / np.maximum(error, 1e-300)
        Y = rounded(a, activation_bound(z, error, a, slope, F32))
        saved.append(rounded(z, error) if act.saves == "Z" else Y)
        inputs.append(Y)
    t = target if target.dtype.kind in "iu" else target.astype(float)
    wide = None if weight is None else weight.astype(float)
    last = network.layers[-1].activation

    def loss_of(z: Array) -> tuple[Array, Array]:
        return reference.loss(z, t, loss, options, last, wide)[:2]

    value, dZ = loss_of(z)
    scale = _scale(target, weight, options or {})
    large = 1 + np.abs(z).max(axis=1, keepdims=True)
    if loss == "cross_entropy":  # of a softmax no derivative is above 1
        moved = 2 * scale * error.max(axis=1, keepdims=True)
    else:
        moved = np.maximum(*(np.abs(loss_of(z + side * error)[1] - dZ) for side in (-1, 1)))
        large = large + np.abs(target).max(axis=1, keepdims=True)
    moved = moved + FORMULA * U * scale * large
    loss_error = ((np.abs(dZ) + moved) * error).sum() + FORMULA * U * (scale * large**2).sum()
    d = rounded(dZ, moved)

    G, G_error = np.zeros(network.size), np.zeros(network.size)
    for i in reversed(range(len(tensors))):
        layer = network.layers[i]
        dW, dW_error = product(d[0].T, d[1].T, *inputs[i])
        places = [(layer.weight, dW, dW_error)]
        if layer.bias is not None:
            ones = np.ones((len(X), 1))
            places.append((layer.bias, *product(d[0].T, d[1].T, ones)))
        for start, g, g_error in places:
            G[start : start + g.size], G_error[start : start + g.size] = g.ravel(), g_error.ravel()
        if not i:
            break
        g, error = product(*d, tensors[i][0])
        act = ACTIVATIONS[network.layers[i - 1].activation]
        s, s_error = saved[i - 1]
        slope, *ends = (act.derivative(m, s + side * s_error) + 0 * s for side in (0, -1, 1))
        steep = FORMULA * U * np.maximum(np.maximum(1, np.abs(s)), np.abs(slope))
        steep = steep + np.maximum(*(np.abs(end - slope) for end in ends))
        d = rounded(g * slope, np.abs(slope) * error + steep * (np.abs(g) + error))
    return (value, loss_error), (G, G_error)


def _scale(target: Array, weight: Array | None, options: Any) -> Array:
    """What each row may weigh in the mean, (rows, 1)."""
    w = np.ones(len(target)) if weight is None else weight.astype(float)
    classes = options.get("class_weight")
    if classes is None:
        return (w / w.sum())[:, None]
    return (w * classes.max() / (w * classes[target]).sum())[:, None]


def check(
    backend: Any, widths: Sequence[int], rows: int, activations: str | Sequence[str] = "relu",
    loss: str = "mse", options: Any = None, weighted: bool = False,
    without_bias: Sequence[int] = (),
) -> None:  # fmt: skip
    """Loss and gradients within their bounds, and the same bits once more."""
    network = Network.of(widths, activations, without_bias)
    rng = np.random.default_rng(rows)
    X = rng.standard_normal((rows, widths[0])).astype(F32)
    P = rng.standard_normal(network.size).astype(F32)
    for x in network.layers:
        P[x.weight : x.weight + x.in_features * x.out_features] /= np.sqrt(x.in_features)
    target = targets(loss, rng, rows, widths[-1])
    weight = rng.integers(0, 3, rows).astype(F32) if weighted else None
    given = network, X, target, P, loss, options, weight
    value, G = run(backend, *given)
    (exact, error), (exact_G, G_error) = bounded(*given)
    what = f"{widths} {rows} {loss}"
    assert_within(value, exact, np.asarray(error), what)
    assert_within(G.astype(float), exact_G, G_error, what)
    again = run(backend, *given)
    assert value.tobytes() == again[0].tobytes() and G.tobytes() == again[1].tobytes()


def whole_numbers(rows: int, widths: Sequence[int]) -> tuple[Network, Any]:
    """A network and what it is given, such that bf16 and float32 hold every number on the way."""
    network, rng = Network.of(widths), np.random.default_rng(0)
    X = rng.integers(-2, 3, (rows, widths[0])).astype(F32)
    P = np.zeros(network.size, F32)
    Y = X
    for W, b in network.tensors(P):  # views
        for row in W:  # two terms a sum, so that nothing grows beyond 8 bits
            row[rng.integers(0, len(row), 2)] = rng.choice([-1, 1], 2)
        b[...] = rng.integers(-1, 2, len(b))
        Z = Y @ W.T + b
        Y = np.maximum(Z, 0)
    weight = np.zeros(rows, F32)
    weight[-(1 << (rows.bit_length() - 1)) :] = 1  # which sum up to a power of 2
    target = (Z - rng.integers(-2, 3, Z.shape)).astype(F32)
    return network, (X, target, P, "mse", None, weight)


def expect_exact(backend: Any, rows: int, widths: Sequence[int]) -> None:
    """Loss and gradients of whole numbers, to the last bit."""
    network, given = whole_numbers(rows, widths)
    value, G = run(backend, network, *given)
    wide = [a.astype(float) if isinstance(a, np.ndarray) else a for a in given]
    exact, exact_G = reference.mlp_step(*wide[:3], network.layers, *wide[3:])
    assert value == exact and np.array_equal(G, exact_G), (rows, widths)
    assert rows < 60 or np.count_nonzero(G) > G.size / 4
